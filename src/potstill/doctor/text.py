"""A `Diagnosis` as a terminal shows it: a verdict and a command first, then what they rest on, a screenful."""

from __future__ import annotations

import textwrap

from potstill.doctor.cost import CARDS, UTILISATION
from potstill.doctor.examination import Diagnosis, Side

WIDTH = 120
LABEL, COLUMN = 28, 26


def as_text(diagnosis: Diagnosis) -> str:
    """The whole report."""
    parts = [
        [
            *_field("verdict", f"{diagnosis.method}: {diagnosis.reason}"),
            f"{'command':<10}{diagnosis.command}",
        ],
        _models(diagnosis),
        _positions(diagnosis),
        _costs(diagnosis),
        [line for note in diagnosis.notes for line in _field("note", note)],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _models(diagnosis: Diagnosis) -> list[str]:
    teacher, student = diagnosis.teacher, diagnosis.student
    compared = diagnosis.vocabularies
    share = compared.shared_tokens / max(1, compared.student_tokens)
    rows = [
        ("parameters", *(_count(side.size.parameters) for side in (teacher, student))),
        (
            "tokens / rows of the head",
            *(f"{side.tokens} / {side.size.vocabulary_rows}" for side in (teacher, student)),
        ),
        (
            "begin, end of a sequence",
            *(f"{side.bos or '–'}  {side.eos or '–'}" for side in (teacher, student)),
        ),
        ("chat template", *(side.chat_template or "none" for side in (teacher, student))),
        ("  opens with", *(_opening(side) for side in (teacher, student))),
        ("  ends a turn with", *(side.ends_turn or "–" for side in (teacher, student))),
        ("generation stops at", *(", ".join(side.stops) or "–" for side in (teacher, student))),
        ("context, tokens", *(str(side.context_tokens or "–") for side in (teacher, student))),
    ]
    text = diagnosis.text
    if text is not None:
        bytes_a_token = [
            text.answer_bytes / max(1, count)
            for count in (text.teacher_supervised_tokens, text.supervised_tokens)
        ]
        rows.insert(2, ("bytes a token, your text", *(f"{value:.2f}" for value in bytes_a_token)))
    lines = [_row("", "teacher", "student"), *(_row(*row) for row in rows)]
    in_common = f"{compared.shared_tokens} tokens in common, {share:.0%} of the student's"
    lines.append(_row("the two vocabularies", f"{compared.relation}: {in_common}", ""))
    if diagnosis.teacher_bits_per_byte is not None:
        own, students = diagnosis.teacher_bits_per_byte.values()
        scores = (
            f"{own:.3f} bits a byte under its own chat template, {students:.3f} under the student's"
        )
        lines.append(_row("the teacher on the answers", scores, ""))
    return lines


def _positions(diagnosis: Diagnosis) -> list[str]:
    """At how many of the student's positions each form teaches more than the text does."""
    text = diagnosis.text
    if text is None:
        return ["No data was given: --data tells how much of your own text corresponds."]
    total, count = text.supervised_tokens, text.conversations
    head = f"{total} positions to learn in {count} conversations" + (
        f" of {text.of}" if text.of > count else ""
    )
    lines = [f"{head}; the teacher says more than the text's next token at"]
    if diagnosis.vocabularies.first_difference is None:
        lines.append(_share("logits", text.roots, total, ""))
    else:
        lines += [
            _share(
                "cross",
                text.roots + text.interiors,
                total,
                f"{text.interiors} of them inside a teacher token",
            ),
            _share(
                "one to one",
                text.one_to_one,
                total,
                "single tokens over the same bytes, all that strict matching would teach",
            ),
            _share(
                "the last",
                count,
                total,
                "one position a conversation, all that padding logits at the end would teach",
            ),
            _share(
                "disagree",
                text.disagreeing_roots,
                text.roots,
                "of the boundaries of both: spelled differently there",
            ),
        ]
    return lines


def _costs(diagnosis: Diagnosis) -> list[str]:
    plan, card = diagnosis.plan, diagnosis.card
    conversations = f"{plan.conversations_a_step} conversations of {plan.tokens:.0f} tokens"
    lines = [f"{plan.steps} steps of {conversations}, {plan.precision}"]
    lines.append(
        f"  {'':<8}{'student':>10}{'activations':>13}{'teacher':>10}{'= memory':>10}{'disk':>10}{'compute':>13}{card or '':>12}"
    )
    for method, cost in diagnosis.costs.items():
        memory = (
            f"{_bytes(cost.student_memory_bytes):>10}{_bytes(cost.activation_memory_bytes):>13}"
        )
        memory += f"{_bytes(cost.teacher_memory_bytes) if cost.teacher_memory_bytes else '–':>10}{_bytes(cost.memory_bytes):>10}"
        hours = "" if cost.hours is None else _time(cost.hours)
        lines.append(
            f"  {method:<8}{memory}{_bytes(cost.disk_bytes):>10}{_flops(cost.flops):>13}{hours:>12}"
        )
    if card is None:
        lines.append("  --card h100 tells the time")
    else:
        memory = _bytes(CARDS[card.lower()].memory_bytes)
        lines.append(
            f"  on one {card} of {memory} at {UTILISATION:.0%} of its peak, which models below a billion parameters do not reach"
        )
    return lines


def _field(label: str, text: str) -> list[str]:
    first, *rest = textwrap.wrap(text, WIDTH - 10, break_long_words=False, break_on_hyphens=False)
    return [f"{label:<10}{first}", *(f"{'':<10}{line}" for line in rest)]


def _row(label: str, teacher: str, student: str) -> str:
    if student:
        teacher, student = _fitted(teacher, COLUMN - 2), _fitted(student, WIDTH - LABEL - COLUMN)
    return f"{label:<{LABEL}}{teacher:<{COLUMN}}{student}".rstrip()


def _fitted(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _share(label: str, count: int, total: int, remark: str) -> str:
    return f"  {label:<12}{count / max(1, total):>6.1%}   {remark}".rstrip()


def _opening(side: Side) -> str:
    return (
        "–" if side.chat_template is None else _fitted(side.opening.replace("\n", "⏎"), COLUMN - 2)
    )


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _flops(count: float) -> str:
    unit, size = next(
        (unit, size)
        for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9))
        if count >= size or unit == "G"
    )
    return f"{count / size:.3g} {unit}FLOP"


def _time(hours: float) -> str:
    return (
        f"{hours:.1f} h"
        if hours >= 1
        else f"{hours * 60:.1f} min"
        if hours >= 1 / 60
        else f"{hours * 3600:.1f} s"
    )
