"""Make a student of a wanted size and write its folder, for `potstill student --parameters`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.data.conversations import Conversation
from potstill.errors import ConfigError
from potstill.models import load_config, load_model
from potstill.processes import print_main
from potstill.protocols import CausalLM, Tokenizer
from potstill.run_folder import whole_folder, write_json
from potstill.students.families import Sizes, family_of, resized, sizes_of
from potstill.students.layers import choose_layers, save_student
from potstill.students.make import refuse_used_folder
from potstill.students.search import Found, search_student
from potstill.students.sizes import Fixed, Shapes, parameters_of_bytes, wanted_parameters

Answers = Callable[[CausalLM, Tokenizer], Iterable[Conversation]]
STUDENT_JSON = "student.json"


@dataclass(frozen=True)
class SizeWanted:
    """The size of a student as it is written on the command line; None is free."""

    parameters: str | None = None
    bytes: str | None = None
    precision: str | None = None
    layers: list[int] | int | str | None = None
    hidden: int | None = None
    neurons: int | None = None
    groups: int | None = None
    experts: int | None = None

    def resolved(self, shapes: Shapes) -> tuple[int | None, Fixed]:
        """Return the wanted parameters and the fixed sizes. Raises: ConfigError."""
        if self.parameters and self.bytes:
            raise ConfigError("parameters and bytes: both are a size; give one of them")
        if self.precision and not self.bytes:
            raise ConfigError("precision is the one of the weights in --bytes; give --bytes too")
        teacher, wanted = shapes.parameters(shapes.teacher), None
        if self.parameters:
            wanted = wanted_parameters(self.parameters, teacher)
        elif self.bytes:
            wanted = parameters_of_bytes(self.bytes, self.precision or "bf16", teacher)
        layers, count = self.layers, shapes.teacher.layers
        if isinstance(layers, str):
            layers = {"half": max(1, count // 2), "all": count}[layers]
        if layers is not None:
            choose_layers(layers, of=count)
        fixed = Fixed(layers, self.hidden, self.neurons, self.groups, self.experts)
        resized(shapes.config, shapes.base(fixed))
        return wanted, fixed


def make_sized_student(
    teacher: str,
    output_dir: str,
    size: SizeWanted,
    *,
    answers: Answers,
    trust_remote_code: bool = False,
) -> Path:
    """Write the best student of a size to a new folder, with student.json: all that were tried.

    ``answers`` returns calibration conversations, given the teacher. Raises: RunFolderError if the
    folder is not empty; ConfigError for a size that cannot be reached; ModelError for a quantized
    teacher or a family that cannot be narrowed; DataError for too little calibration text.
    """
    begun = time.monotonic()
    folder = refuse_used_folder(output_dir)
    config = load_config(teacher, trust_remote_code=trust_remote_code)
    family_of(config)
    wanted, fixed = size.resolved(Shapes(config))
    if wanted is not None:
        Shapes(config).depths(wanted, fixed, count=1)  # before the weights are opened
    model, tokenizer = load_model(teacher, trust_remote_code=trust_remote_code)
    conversations = list(answers(model, tokenizer))
    found = search_student(model, tokenizer, conversations, wanted=wanted, fixed=fixed)
    facts = {
        "made from": teacher,
        "layers kept": ", ".join(map(str, found.cut.layers)),
        "sizes": str(found.cut.sizes),
        "parameters": f"{found.student.num_parameters():,}",
        "KL from the teacher": f"{found.kl_refitted:.3f} nats per token, as cut "
        f"{found.kl_as_cut:.3f} ({found.held_out_tokens} held-out tokens)",
        "calibration": f"{found.calibration_tokens} tokens",
        "state": "cut and refitted, not yet trained",
    }
    record = _record(teacher, wanted, found, sizes_of(config), time.monotonic() - begun)
    with whole_folder(folder) as unfinished:
        notes = candidates_table(found)
        save_student(found.student, tokenizer, unfinished, provenance=facts, notes=notes)
        write_json(unfinished / STUDENT_JSON, record)
    print_main(candidates_table(found) + _summary(found))
    return folder


def candidates_table(found: Found) -> str:
    """Return the tried students as a Markdown table, the best first; empty if none was tried."""
    if not found.candidates:
        return ""
    ranked = sorted(found.candidates, key=lambda one: one.kl_refitted)
    head = "| layers | neurons | key/value groups | hidden size | parameters "
    lines = [f"{head}| KL as cut | KL refitted |", "|" + "---|" * 7]
    for one in ranked:
        sizes = one.sizes
        shape = f"{sizes.layers} | {sizes.neurons} | {sizes.groups} | {sizes.hidden}"
        lines.append(
            f"| {shape} | {one.parameters:,} | {one.kl_as_cut:.3f} | {one.kl_refitted:.3f} |"
        )
    note = "KL from the teacher, nats per token, on held-out text; refitted on a part of the text."
    return "\n".join([*lines, "", note, ""])


def _summary(found: Found) -> str:
    parameters = f"{found.student.num_parameters():,} parameters: {found.cut.sizes}"
    nats = f"KL from the teacher {found.kl_refitted:.3f} nats per token"
    return f"{parameters}\n{nats}, as cut {found.kl_as_cut:.3f}"


def _record(
    teacher: str, wanted: int | None, found: Found, whole: Sizes, seconds: float
) -> dict[str, Any]:
    """Return what student.json holds."""
    return {
        "teacher": teacher,
        "teacher_sizes": dataclasses.asdict(whole),
        "wanted_parameters": wanted,
        "parameters": found.student.num_parameters(),
        "sizes": dataclasses.asdict(found.cut.sizes),
        "layers": found.cut.layers,
        "kl_as_cut_nats": found.kl_as_cut,
        "kl_refitted_nats": found.kl_refitted,
        "calibration_tokens": found.calibration_tokens,
        "held_out_tokens": found.held_out_tokens,
        "seconds": round(seconds, 1),
        "candidates": [dataclasses.asdict(one) for one in found.candidates],
    }
