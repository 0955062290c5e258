"""Format a `Diagnosis` for a terminal: verdict and command first, then the evidence."""

from __future__ import annotations

import textwrap

from potstill.doctor.cost import CARDS, UTILIZATION
from potstill.doctor.diagnosis import Diagnosis, Side
from potstill.teachers.quantization_cost import cost_text

WIDTH = 120
LABEL, COLUMN = 28, 26


def as_text(diagnosis: Diagnosis) -> str:
    """Return the whole page."""
    verdict = _field("verdict", f"{diagnosis.method}: {diagnosis.reason}")
    parts = [
        [*verdict, f"{'command':<10}{diagnosis.command}"],
        _models(diagnosis),
        _positions(diagnosis),
        _costs(diagnosis),
        _storage(diagnosis),
        [line for note in diagnosis.notes for line in _field("note", note)],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _models(diagnosis: Diagnosis) -> list[str]:
    compared, text = diagnosis.vocabularies, diagnosis.text
    columns = [_properties(side) for side in (diagnosis.teacher, diagnosis.student)]
    if text is not None:
        counts = (text.teacher_supervised_tokens, text.supervised_tokens)
        for column, count in zip(columns, counts, strict=True):
            column["bytes per token, your text"] = f"{text.answer_bytes / max(1, count):.2f}"
    lines = [_row("", "teacher", "student")]
    lines += [_row(label, value, columns[1][label]) for label, value in columns[0].items()]
    share = compared.shared_tokens / max(1, compared.student_tokens)
    in_common = f"{compared.shared_tokens} tokens in common, {share:.0%} of the student's"
    lines.append(_row("the two vocabularies", f"{compared.relation}: {in_common}", ""))
    if diagnosis.teacher_bits_per_byte is not None:
        own, students = diagnosis.teacher_bits_per_byte.values()
        scores = f"{own:.3f} bits per byte under its own chat template"
        scores += f", {students:.3f} under the student's"
        lines.append(_row("the teacher on the answers", scores, ""))
    if diagnosis.quantization_cost is not None:
        title = f"quantized to {diagnosis.plan.quantize_teacher}"
        lines.append(_row(title, cost_text(diagnosis.quantization_cost), ""))
    return lines


def _properties(side: Side) -> dict[str, str]:
    return {
        "parameters": _count(side.size.parameters),
        "tokens / rows of the head": f"{side.tokens} / {side.size.vocabulary_rows}",
        "begin, end of a sequence": f"{side.bos or '–'}  {side.eos or '–'}",
        "chat template": side.chat_template or "none",
        "  opens with": _opening(side),
        "  ends a turn with": side.ends_turn or "–",
        "generation stops at": ", ".join(side.stops) or "–",
        "context, tokens": str(side.context_tokens or "–"),
    }


def _positions(diagnosis: Diagnosis) -> list[str]:
    """Return the share of the student's positions at which each method has a target."""
    text = diagnosis.text
    if text is None:
        return ["No data was given; --data measures how many of your tokens have a target."]
    total, count = text.supervised_tokens, text.conversations
    of = f" of {text.of}" if text.of > count else ""
    lines = [f"{total} supervised tokens in {count} conversations{of}; the teacher has a target at"]
    if diagnosis.vocabularies.first_difference is None:
        return [*lines, _share("logits", text.roots, total, "")]
    inside = f"{text.interiors} of them inside a teacher token"
    strict = "single tokens over the same bytes: the targets of strict matching"
    last = "one position per conversation: the targets of padded last logits"
    disagree = "of the common boundaries: the two tokenizers spell differently there"
    return [
        *lines,
        _share("cross", text.roots + text.interiors, total, inside),
        _share("one to one", text.one_to_one, total, strict),
        _share("the last", count, total, last),
        _share("disagree", text.disagreeing_roots, text.roots, disagree),
    ]


def _costs(diagnosis: Diagnosis) -> list[str]:
    plan, card = diagnosis.plan, diagnosis.card
    conversations = f"{plan.conversations_a_step} conversations of {plan.tokens:.0f} tokens"
    titles = ("", "student", "activations", "teacher", "= memory", "disk", "compute", card or "")
    teacher = f", teacher in {plan.quantize_teacher}" if plan.quantize_teacher else ""
    lines = [f"{plan.steps} steps of {conversations}, {plan.precision}{teacher}"]
    lines.append(_cost_row(*titles))
    for method, cost in diagnosis.costs.items():
        cells = (
            method,
            _bytes(cost.student_memory_bytes),
            _bytes(cost.activation_memory_bytes),
            _bytes(cost.teacher_memory_bytes) if cost.teacher_memory_bytes else "–",
            _bytes(cost.memory_bytes),
            _bytes(cost.disk_bytes),
            _flops(cost.flops),
            "" if cost.hours is None else _time(cost.hours),
        )
        lines.append(_cost_row(*cells))
    if card is None:
        return [*lines, "  --card h100 estimates the time"]
    memory = _bytes(CARDS[card.lower()].memory_bytes)
    lines.append(
        f"  on one {card} of {memory} at {UTILIZATION:.0%} of its peak, which models below a "
        "billion parameters do not reach"
    )
    return lines


def _storage(diagnosis: Diagnosis) -> list[str]:
    """Return what a teacher takes that is captured, or served by another machine."""
    found = diagnosis.storage
    if found is None:
        return []
    kept = ", ".join(f"{name} {_bytes(count)}" for name, count in found.captured_bytes.items())
    return [
        *_field("captured", f"all conversations take {kept} (potstill capture --keep …)"),
        *_field(
            "served",
            f"{_bytes(found.served_bytes_a_step)} of traffic a step (potstill serve)",
        ),
        *_field("", f"both: {_bytes(found.head_bytes)} once, for the LM head"),
    ]


def _cost_row(method: str, *cells: str) -> str:
    widths = (10, 13, 10, 10, 10, 13, 12)
    numbers = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"  {method:<8}{numbers}"


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
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def _flops(count: float) -> str:
    units = (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9))
    unit, size = next(((unit, size) for unit, size in units if count >= size), units[-1])
    return f"{count / size:.3g} {unit}FLOP"


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * 3600:.1f} s"
