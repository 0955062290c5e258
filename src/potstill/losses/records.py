"""Describe every divergence in one record: name, parameters, formula and source.

Everything that lists divergences (settings, --help, plots, docs) reads these records. This module
does not import torch, so that --help is quick; the functions are imported when they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from potstill.losses.closed_forms import ClosedForm


def inside_unit_interval(name: str, value: float) -> float:
    """Return ``value``. Raises: ValueError if it is not in the open interval (0, 1)."""
    if not 0 < value < 1:
        raise ValueError(f"{name} = {value}: must be between 0 and 1, excluding both")
    return value


@dataclass(frozen=True)
class Parameter:
    """Describe a parameter of a divergence: a number in (0, 1)."""

    name: str
    default: float
    help: str

    def check(self, value: float) -> float:
        """Return ``value``. Raises: ValueError if it is not in (0, 1)."""
        return inside_unit_interval(self.name, value)


@dataclass(frozen=True)
class Divergence:
    """Describe one divergence for losses, configuration, command line, plots and docs."""

    name: str
    dense: Callable[..., Tensor] | None = None
    """``(teacher_logits [N, V], student_logits [N, V], *, temperature, …)`` → ``[N]`` nats; if
    None, the function of this name in divergences.py."""
    closed_form: ClosedForm | None = None
    """Loss and gradient of one block of logits. If None: the function of this name in
    closed_forms.py, or, where ``dense`` is given, autograd."""
    parameters: tuple[Parameter, ...] = ()
    formula: str = ""
    source: str = ""

    def __call__(self, teacher_logits: Tensor, student_logits: Tensor, **settings: float) -> Tensor:
        """Return the dense form's value."""
        from potstill.losses import divergences

        dense = self.dense or getattr(divergences, self.name)
        value: Tensor = dense(teacher_logits, student_logits, **settings)
        return value

    def value_and_gradient(self) -> ClosedForm:
        """Return the closed form, or one made from ``dense`` by autograd."""
        from potstill.losses import closed_forms

        if self.closed_form is None and self.dense is not None:
            return closed_forms.by_autograd(self.dense)
        found: ClosedForm = self.closed_form or getattr(closed_forms, self.name)
        return found

    def parameters_from(self, given: Mapping[str, float]) -> dict[str, float]:
        """Return this divergence's parameters, checked: from ``given``, else the defaults."""
        return {one.name: one.check(given.get(one.name, one.default)) for one in self.parameters}


TEACHER_WEIGHT = Parameter(
    "teacher_weight", 0.5, "The teacher's share w of jensen_shannon's mixture."
)
SKEW = Parameter("skew", 0.1, "Weight a in the mixture of the two skew divergences.")
SKEW_FORWARD, SKEW_REVERSE = "KL(q ‖ a·q + (1−a)·p)", "KL(p ‖ (1−a)·q + a·p)"
JS = "w·KL(q‖m) + (1−w)·KL(p‖m), m = w·q + (1−w)·p"
HINTON = "Hinton et al. 2015, arXiv 1503.02531"
MINILLM = "Gu et al. 2023 (MiniLLM), arXiv 2306.08543"
GKD = "Agarwal et al. 2023 (GKD), arXiv 2306.13649"
DISTILLM = "Ko et al. 2024 (DistiLLM), arXiv 2402.03898"
WEN = "Wen et al. 2023 (f-distillation), arXiv 2307.15190"

RECORDS = (
    Divergence("forward_kl", formula="Σ q log(q/p)", source=HINTON),
    Divergence("reverse_kl", formula="Σ p log(p/q)", source=MINILLM),
    Divergence("jensen_shannon", parameters=(TEACHER_WEIGHT,), formula=JS, source=GKD),
    Divergence("skew_forward_kl", parameters=(SKEW,), formula=SKEW_FORWARD, source=DISTILLM),
    Divergence("skew_reverse_kl", parameters=(SKEW,), formula=SKEW_REVERSE, source=DISTILLM),
    Divergence("total_variation", formula="½ Σ |q − p|", source=WEN),
)
"""All divergences. To add one, add a record here and the functions of its name."""

DIVERGENCES: dict[str, Divergence] = {one.name: one for one in RECORDS}


def all_parameters() -> dict[str, Parameter]:
    """Return every parameter of every divergence in `DIVERGENCES`, by name."""
    return {one.name: one for record in DIVERGENCES.values() for one in record.parameters}
