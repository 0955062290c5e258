"""Can this teacher teach this student, how, and what will it cost?"""

from potstill.doctor.cost import Plan, estimate, model_size
from potstill.doctor.examination import Diagnosis, examine, quick_check
from potstill.doctor.text import as_text

__all__ = [
    "Diagnosis",
    "Plan",
    "as_text",
    "estimate",
    "examine",
    "model_size",
    "quick_check",
]
