"""Examine a teacher, a student and a planned run, before any compute is spent.

    potstill doctor TEACHER STUDENT --data answers.jsonl

This reads two configurations, two tokenizers and the data; weights only on request. The result is a
`Diagnosis`, which doctor/text.py formats for a terminal.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from potstill.alignment import (
    VocabularyComparison,
    compare_vocabularies,
    shared_rows,
    stop_tokens,
    token_bytes,
)
from potstill.alignment.probe import PROBE
from potstill.data import read_conversations
from potstill.data.answers import render_answers
from potstill.data.chat_templates import set_chat_template
from potstill.data.conversations import Conversation
from potstill.defaults import EVAL_FRACTION, MAX_LENGTH, PASSES
from potstill.doctor.cost import Plan, estimate, find_card, model_size
from potstill.doctor.diagnosis import Diagnosis, Side
from potstill.doctor.measured_text import MeasuredText, measure_text
from potstill.doctor.notes import notes_on_pair, notes_on_run, notes_on_text
from potstill.doctor.storage import storage
from potstill.doctor.teacher_scores import score_teacher
from potstill.errors import ChatTemplateError, ConfigError, VocabularyMismatch
from potstill.models import ModelOpener
from potstill.models.lora import check_lora
from potstill.models.quantized import check_kind, refuse_unopenable
from potstill.protocols import Tokenizer
from potstill.reading import Reading

TALK = [
    {"role": "user", "content": "Why does it rain?"},
    {"role": "assistant", "content": "Vapour cools and falls."},
]
ENOUGH_TARGETS = 0.5
"""With fewer targets per position, a cross-tokenizer loss is mostly cross-entropy: use text."""
MILLION = 1_000_000


@dataclass(frozen=True)
class _Request:
    """The arguments of `examine`."""

    teacher: str
    student: str
    data: str | None
    card: str | None
    opener: ModelOpener
    with_weights: bool
    max_steps: int | None
    batch_size: int
    gradient_accumulation_steps: int
    max_length: int
    precision: str
    quantize_teacher: str | None
    lora: int | None
    activation_checkpointing: bool


def quick_check(
    teacher_tokenizer: Tokenizer, student_tokenizer: Tokenizer, method: str
) -> str | None:
    """Raise if training cannot work; return a remark if another method is better, else None.

    Raises: VocabularyMismatch for logits with different tokenizers, and if no token is shared;
    OpaqueTokenizer if a cross-tokenizer method needs bytes that cannot be recovered.
    """
    if method == "text":
        return None
    if method == "logits":
        shared_rows(teacher_tokenizer, student_tokenizer)
        by_teacher, by_student = map(_rendered, (teacher_tokenizer, student_tokenizer))
        if None in (by_teacher, by_student) or by_teacher == by_student:
            return None
        return (
            "note: the chat templates differ, and the teacher reads the student's, which it may "
            "not know; potstill doctor --with-weights measures the effect"
        )
    if compare_vocabularies(teacher_tokenizer, student_tokenizer).first_difference is None:
        return (
            "teacher and student have the same tokenizer: cross works and teaches the same, but "
            "--method logits is cheaper"
        )
    known = set(filter(None, token_bytes(teacher_tokenizer)))
    if known.isdisjoint(token_bytes(student_tokenizer)):
        raise VocabularyMismatch(
            "teacher and student have no token in common; use --method text instead"
        )
    return None


def _rendered(tokenizer: Tokenizer) -> str | None:
    """Return a short conversation in the tokenizer's chat template, None if it has none."""
    try:
        return render_answers(tokenizer, TALK).text if tokenizer.chat_template else None
    except ChatTemplateError:  # only the student's is used, and is checked with the data
        return None


def examine(
    teacher: str,
    student: str,
    *,
    data: str | None = None,
    reading: Reading | None = None,
    max_steps: int | None = None,
    batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    max_length: int = MAX_LENGTH,
    precision: str = "bf16",
    quantize_teacher: str | None = None,
    lora: int | None = None,
    activation_checkpointing: bool = False,
    card: str | None = None,
    chat_template: str | None = None,
    with_weights: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Diagnosis:
    """Examine a pair and its planned run. ``with_weights`` loads the teacher and needs ``data``.

    Raises: ModelError, ConfigError; VocabularyMismatch if no token is shared; OpaqueTokenizer if
    bytes cannot be recovered; ChatTemplateError for a template that loses the answer; DataError for
    data without supervised tokens.
    """
    request = _Request(
        teacher=teacher,
        student=student,
        data=data,
        card=card,
        opener=ModelOpener(device, "auto", chat_template, trust_remote_code),
        with_weights=with_weights,
        max_steps=max_steps,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        max_length=max_length,
        precision=precision,
        quantize_teacher=quantize_teacher,
        lora=lora,
        activation_checkpointing=activation_checkpointing,
    )
    _check(request)
    return _diagnose(request, list(read_conversations(data, reading=reading)) if data else [])


def _check(request: _Request) -> None:
    """Raises: ConfigError for settings that cannot be met."""
    if request.card is not None:
        find_card(request.card)
    check_kind(request.quantize_teacher)
    check_lora(request.lora)
    if request.with_weights and request.data is None:
        raise ConfigError(
            "--with-weights scores the teacher on text, and there is none; give --data"
        )
    if request.quantize_teacher:
        config = request.opener.config(request.teacher)
        refuse_unopenable(request.teacher, config, request.quantize_teacher)


def _diagnose(request: _Request, conversations: list[Conversation]) -> Diagnosis:
    sources = (request.teacher, request.student)
    # Without the given template, to see which tokenizer has its own.
    as_saved = replace(request.opener, chat_template=None)
    tokenizers = teacher_tokenizer, student_tokenizer = [
        as_saved.tokenizer(source) for source in sources
    ]
    vocabularies = compare_vocabularies(*tokenizers)
    same = vocabularies.first_difference is None
    if not same:
        quick_check(teacher_tokenizer, student_tokenizer, "cross")
    sides = [
        _side(source, tokenizer, request.opener)
        for source, tokenizer in zip(sources, tokenizers, strict=True)
    ]
    text = None
    if request.data:
        text = measure_text(conversations, *tokenizers, same=same, max_length=request.max_length)
    method, reason = _verdict(sides, vocabularies, text)
    plan = _plan(text, request, tokenizers)
    teacher, student = sides
    costs = {
        name: estimate(name, teacher.size, student.size, plan, card=request.card)
        for name in dict.fromkeys(("text", method))
    }
    bits_per_byte, cost = _scores(request, tokenizers, conversations)
    longest_tokens = text.longest if text else request.max_length
    return Diagnosis(
        method=method,
        reason=reason,
        command=_command(request, method),
        teacher=teacher,
        student=student,
        vocabularies=vocabularies,
        data=request.data,
        text=text,
        teacher_bits_per_byte=bits_per_byte,
        plan=plan,
        costs=costs,
        card=request.card,
        notes=[
            *notes_on_pair(sides, method),
            *notes_on_text(text, tokenizers, method),
            *notes_on_run(sides, costs[method], request.card, longest_tokens),
        ],
        storage=storage(method, teacher.size, plan, text.of if text else None),
        quantization_cost=cost,
    )


def _scores(
    request: _Request, tokenizers: Sequence[Tokenizer], conversations: Sequence[Conversation]
) -> tuple[dict[str, float] | None, dict[str, Any] | None]:
    """Return what only the teacher's weights tell, if they are to be opened."""
    if not request.with_weights:
        return None, None
    return score_teacher(
        request.teacher,
        replace(request.opener, quantize=request.quantize_teacher),
        tokenizers,
        conversations,
        max_length=request.max_length,
        precision=request.precision,
    )


def _side(source: str, tokenizer: Tokenizer, opener: ModelOpener) -> Side:
    """Describe one model; set the given chat template if the tokenizer has none, as a run does.

    Raises: ChatTemplateError if the template loses the answer.
    """
    config = opener.config(source)
    template = "its own" if tokenizer.chat_template else opener.chat_template
    set_chat_template(tokenizer, opener.chat_template)
    opening, ends_turn = "", None
    if tokenizer.chat_template:
        rendered = render_answers(tokenizer, TALK).text
        opening, _, closing = rendered.partition(TALK[0]["content"])
        closing = closing.partition(TALK[1]["content"])[2]
        after = tokenizer.encode(closing, add_special_tokens=False)
        ends = stop_tokens(tokenizer)
        ends_turn = next((tokenizer.convert_ids_to_tokens(i) for i in after if i in ends), None)
    stops = opener.generation_config(source).eos_token_id or tokenizer.eos_token_id
    stop_ids = stops if isinstance(stops, list) else [stops]
    return Side(
        source=source,
        tokens=len(tokenizer),
        size=model_size(config, trust_remote_code=opener.trust_remote_code),
        chat_template=template,
        opening=opening,
        ends_turn=ends_turn,
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
        stops=[tokenizer.convert_ids_to_tokens(i) for i in stop_ids if i is not None],
        context_tokens=getattr(config.get_text_config(), "max_position_embeddings", None),
    )


def _verdict(
    sides: Sequence[Side], vocabularies: VocabularyComparison, text: MeasuredText | None
) -> tuple[str, str]:
    """Return the method, and the reason in one line."""
    if vocabularies.first_difference is None:
        rows, other_rows = (side.size.vocabulary_rows for side in sides)
        reason = "equal ids are equal tokens, so the whole distributions can be compared"
        if rows != other_rows:
            shared = vocabularies.shared_rows
            reason += f"; the heads of {rows} and {other_rows} rows are cut to the {shared} shared"
        return "logits", reason
    first, teacher_token, student_token = vocabularies.first_difference
    unsafe = (
        f"logits would be unsafe (id {first} is {teacher_token!r} in the teacher's, "
        f"{student_token!r} in the student's)"
    )
    if text is None:
        share = vocabularies.shared_tokens / vocabularies.student_tokens
        return "cross", f"{unsafe}; the teacher has {share:.0%} of the student's tokens"
    where = "of the positions in your text"
    if text.with_target < ENOUGH_TARGETS:
        return "text", f"{unsafe}, and cross would reach only {text.with_target:.0%} {where}"
    return (
        "cross",
        f"{unsafe}; across tokenizers the teacher reaches {text.with_target:.1%} {where}",
    )


def _plan(text: MeasuredText | None, request: _Request, tokenizers: Sequence[Tokenizer]) -> Plan:
    """Return the run of `potstill distill`; without data, a run over a million student tokens."""
    batch, longest = request.batch_size, text.longest if text else request.max_length
    per_step = batch * request.gradient_accumulation_steps
    if text is None:
        lengths = [len(one.encode(PROBE, add_special_tokens=False)) for one in tokenizers]
        means = [longest] * 2 + [longest * lengths[0] / lengths[1]] * 2
        steps = -(-MILLION // (per_step * longest))
    else:
        training = text.of - max(1, round(text.of * EVAL_FRACTION))
        steps = PASSES * -(-training // per_step)
        sums = [text.tokens, text.supervised_tokens]
        sums += [text.teacher_tokens, text.teacher_supervised_tokens]
        means = [count * (1 / text.conversations) for count in sums]
    tokens, supervised, teacher_tokens, teacher_supervised = means
    return Plan(
        steps=request.max_steps or steps,
        conversations_a_step=per_step,
        tokens=tokens,
        supervised=supervised,
        teacher_tokens=teacher_tokens,
        teacher_supervised=teacher_supervised,
        largest_batch_tokens=batch * longest,
        precision=request.precision,
        quantize_teacher=request.quantize_teacher,
        lora=request.lora,
        activation_checkpointing=request.activation_checkpointing,
    )


def _command(request: _Request, method: str) -> str:
    """Return the `potstill distill` command, with flags only where they are not the default."""
    defaults = inspect.signature(examine).parameters  # the same as those of `potstill distill`
    words = ["potstill", "distill", request.teacher, request.student]
    words += ["--data", request.data or "DATA", "--method", method]
    words += ["--output-dir", f"runs/{Path(request.student).name}"]
    names = ["max_steps", "batch_size", "max_length", "gradient_accumulation_steps", "precision"]
    names += ["quantize_teacher", "lora", "activation_checkpointing"]
    settings = {name: getattr(request, name) for name in names}
    for name in ("chat_template", "trust_remote_code"):
        settings[name] = getattr(request.opener, name)
    for name, value in settings.items():
        if value != defaults[name].default:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)
