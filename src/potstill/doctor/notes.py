"""Warnings about the pair, the data and the run, one line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from potstill.alignment.probe import splits_alike
from potstill.doctor.cost import CARDS, Cost
from potstill.doctor.diagnosis import Side
from potstill.doctor.measured_text import MeasuredText
from potstill.protocols import Tokenizer

FEW_TARGETS, MANY_DISAGREEING = 0.97, 0.02
"""Pairs beyond these limits are worse than usual on prose and code, and get a note."""


def notes_on_pair(sides: Sequence[Side], method: str) -> Iterator[str]:
    """Yield warnings about chat templates, stop tokens and sizes."""
    teacher, student = sides
    for name, side in (("teacher", teacher), ("student", student)):
        if side.ends_turn and side.ends_turn not in side.stops:
            yield (
                f"the {name}'s chat template ends a turn with {side.ends_turn}, but its generation "
                f"stops only at {', '.join(side.stops)}: it would not stop there; add that token "
                "to eos_token_id in generation_config.json"
            )
        if side.chat_template and not side.ends_turn:
            yield (
                f"the {name}'s chat template ends an answer with no special token, so the student "
                "does not learn to stop"
            )
        if not side.chat_template:
            yield (
                f"the {name} has no chat template; for conversations, give --chat-template plain "
                "or a Jinja file"
            )
    for name, side in (("teacher", teacher), ("student", student)):
        if side.size.quantization and name == "student":
            yield (
                f"the student's weights are quantized ({side.size.quantization}), and it cannot be "
                "trained; give the model from which it was quantized"
            )
        elif side.size.quantization:
            yield (
                f"the teacher's weights were saved quantized ({side.size.quantization}); its "
                "memory is less than shown. potstill evaluate QUANTIZED FULL --data FILE measures "
                "what that costs"
            )
    if student.size.parameters >= teacher.size.parameters:
        yield "the student is not smaller than the teacher"
    if method == "logits" and teacher.opening != student.opening:
        yield (
            "the chat templates differ, and the teacher will read the student's; --with-weights "
            "measures the effect"
        )


def notes_on_text(
    text: MeasuredText | None, tokenizers: Sequence[Tokenizer], method: str
) -> Iterator[str]:
    """Yield warnings about the data, and about how the two tokenizers split it."""
    split = (
        "split differently by the two tokenizers, although their tokens are the same; the teacher "
        "will read unusual tokens"
    )
    if text is None:
        if method == "logits" and not splits_alike(*tokenizers):
            yield f"some text is {split}"
        return
    measured = text.conversations + text.dropped + text.not_alignable
    for count, problem in (
        (text.shortened, "are cut at --max-length; their ends are not used"),
        (text.dropped, "have no answer within --max-length and are left out"),
        (text.split_differently, f"are {split}"),
        (
            text.not_alignable,
            "are left out: their answers have different bytes under the two chat templates",
        ),
    ):
        if count:
            yield f"{count} of {measured} conversations {problem}"
    if text.with_target < FEW_TARGETS or text.disagreeing > MANY_DISAGREEING:
        worst = ", ".join(f"{token!r} {count}×" for token, count in text.untaught[:3])
        note = "the two tokenizers split this text less alike than usual; tokens without a target: "
        note += worst
        if text.untaught_blank > 0.1:
            note += f" ({text.untaught_blank:.0%} of all are runs of spaces and line breaks)"
        yield note


def notes_on_run(
    sides: Sequence[Side], cost: Cost, card: str | None, longest_tokens: int
) -> Iterator[str]:
    """Yield warnings about context length and memory."""
    for name, side in zip(("teacher", "student"), sides, strict=True):
        if side.context_tokens is not None and longest_tokens > side.context_tokens:
            yield (
                f"conversations of up to {longest_tokens} tokens are longer than the "
                f"{side.context_tokens} that the {name} can read"
            )
    available_bytes = float("inf") if card is None else CARDS[card.lower()].memory_bytes
    if cost.memory_bytes - cost.activation_memory_bytes > available_bytes:
        yield (
            f"both models with the optimizer's state do not fit on one {card}; use several with "
            "FSDP, or train adapters (LoRA)"
        )
    elif cost.memory_bytes > available_bytes:
        yield (
            f"the run does not fit on one {card}; lower --batch-size, and raise "
            "--gradient-accumulation-steps by the same factor"
        )
