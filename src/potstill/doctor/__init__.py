"""Check whether and how a teacher can teach a student, and what it will cost."""

from potstill.doctor.cost import Plan, estimate, model_size
from potstill.doctor.diagnosis import Diagnosis
from potstill.doctor.examination import examine, quick_check
from potstill.doctor.text import as_text

__all__ = ["Diagnosis", "Plan", "as_text", "estimate", "examine", "model_size", "quick_check"]
