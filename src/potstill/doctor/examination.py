"""Can this teacher teach this student, how, and what will it cost? Answered before any compute is spent.

    potstill doctor TEACHER STUDENT --data answers.jsonl

Read are two configurations, two tokenizers and the user's data; weights only on request. What is found is a `Diagnosis`, which
doctor_text.py lays out for a terminal.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from potstill.alignment import (
    VocabularyComparison,
    compare_vocabularies,
    shared_rows,
    stop_tokens,
    token_bytes,
)
from potstill.data import read_conversations, tokenize_conversations
from potstill.data.chat_templates import answer_spans, ensure_chat_template
from potstill.data.conversations import Conversation
from potstill.doctor.cost import CARDS, Cost, ModelSize, Plan, estimate, find_card, model_size
from potstill.doctor.measured_text import PROBE, MeasuredText, measure_text, splits_alike
from potstill.errors import ConfigError, VocabularyMismatch
from potstill.evaluation.scores import score_tokens, summarize
from potstill.models import load_config, load_generation_config, load_model, load_tokenizer

TALK = [
    {"role": "user", "content": "Why does it rain?"},
    {"role": "assistant", "content": "Vapour cools and falls."},
]
ENOUGH_TARGETS = 0.5
"""With fewer positions than that, a loss across tokenizers is mostly plain cross-entropy, and the teacher not worth its price."""
FEW_TARGETS, MANY_DISAGREEING = 0.97, 0.02
"""Where a pair is worse than prose and code usually are, it is said why."""
SCORED_CONVERSATIONS = 32
EPOCHS, HELD_OUT = 3, 0.1
"""What `potstill distill` does by itself."""
MILLION = 1_000_000


@dataclass(frozen=True)
class Side:
    """What a run meets of one model."""

    source: str
    tokens: int
    """In its tokenizer; the head may have more rows."""
    size: ModelSize
    chat_template: str | None
    """its own, plain, or the path that was given; None without one."""
    opening: str
    """What the template writes before the user's first word."""
    ends_turn: str | None
    """The special token that the template ends an answer with."""
    bos: str | None
    eos: str | None
    stops: list[str]
    """Tokens at which its generation stops."""
    context_tokens: int | None


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found; ``--json`` prints it."""

    method: str
    """The form of distillation to use: logits, cross or text."""
    reason: str
    command: str
    teacher: Side
    student: Side
    vocabularies: VocabularyComparison
    data: str | None
    text: MeasuredText | None
    """The data, measured."""
    teacher_bits_per_byte: dict[str, float] | None
    """Of the answers' own bytes, under the teacher's own chat template and under the student's."""
    plan: Plan
    costs: dict[str, Cost]
    """By text, and by ``method``."""
    card: str | None
    notes: list[str]
    """What should be known, or mended, before the run."""

    def as_dict(self) -> dict[str, Any]:
        """All of it for machines, what follows from the counts included."""
        found = asdict(self)
        if self.text is not None:
            found["text"] |= {
                "with_target": self.text.with_target,
                "disagreeing": self.text.disagreeing,
            }
        for name, cost in self.costs.items():
            found["costs"][name] |= {"flops": cost.flops, "memory_bytes": cost.memory_bytes}
        return found


def quick_check(teacher_tokenizer: Any, student_tokenizer: Any, method: str) -> str | None:
    """Refuse what no training could mend, from tokenizers alone. Returns a remark where another method would do better.

    Raises: VocabularyMismatch for logits across different tokenizers, and for two that share no bytes at all; OpaqueTokenizer if
    a form across tokenizers needs bytes that cannot be recovered.
    """
    if method == "text":
        return None
    if method == "logits":
        shared_rows(teacher_tokenizer, student_tokenizer)
        return None
    if compare_vocabularies(teacher_tokenizer, student_tokenizer).first_difference is None:
        return "teacher and student have the same tokenizer: cross works and teaches the same, --method logits is cheaper"
    if set(filter(None, token_bytes(teacher_tokenizer))).isdisjoint(token_bytes(student_tokenizer)):
        raise VocabularyMismatch(
            "teacher and student have no token in common, not one byte; distil text instead (--method text)"
        )
    return None


def examine(
    teacher: str,
    student: str,
    *,
    data: str | None = None,
    max_steps: int | None = None,
    batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    max_length: int = 1024,
    precision: str = "bf16",
    card: str | None = None,
    chat_template: str | None = None,
    with_weights: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Diagnosis:
    """Examine a pair, and the run that is planned for it. Weights are read only ``with_weights``, which needs ``data``.

    Raises: ModelError, ConfigError; VocabularyMismatch if no bytes are shared and OpaqueTokenizer if they cannot be told;
    ChatTemplateError for a template that loses the answer, DataError for data with nothing to learn.
    """
    if card is not None:
        find_card(card)
    if with_weights and data is None:
        raise ConfigError(
            "--with-weights scores the teacher on text, and there is none; give --data"
        )
    conversations = list(read_conversations(data)) if data else []
    tokenizers = [
        load_tokenizer(source, trust_remote_code=trust_remote_code) for source in (teacher, student)
    ]
    vocabularies = compare_vocabularies(*tokenizers)
    same = vocabularies.first_difference is None
    if not same:
        quick_check(tokenizers[0], tokenizers[1], "cross")
    named = zip((teacher, student), tokenizers, strict=True)
    sides = [
        _side(source, tokenizer, chat_template, trust_remote_code) for source, tokenizer in named
    ]
    text = (
        measure_text(conversations, *tokenizers, same=same, max_length=max_length) if data else None
    )
    method, reason = _verdict(sides, vocabularies, text)
    settings: dict[str, Any] = {
        "max_steps": max_steps,
        "batch_size": batch_size,
        "max_length": max_length,
    }
    settings |= {
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "precision": precision,
        "chat_template": chat_template,
    }
    plan = _plan(text, settings, tokenizers)
    costs = {
        name: estimate(name, sides[0].size, sides[1].size, plan, card=card)
        for name in dict.fromkeys(("text", method))
    }
    bits = None
    if with_weights:
        model, _ = load_model(teacher, device=device, trust_remote_code=trust_remote_code)
        bits = _teacher_bits_per_byte(model, tokenizers, conversations, max_length)
    about_run = _notes_on_run(sides, costs[method], card, text.longest if text else max_length)
    return Diagnosis(
        method=method,
        reason=reason,
        command=_command(
            teacher, student, data, method, {**settings, "trust_remote_code": trust_remote_code}
        ),
        teacher=sides[0],
        student=sides[1],
        vocabularies=vocabularies,
        data=data,
        text=text,
        teacher_bits_per_byte=bits,
        plan=plan,
        costs=costs,
        card=card,
        notes=[
            *_notes_on_pair(sides, method),
            *_notes_on_text(text, tokenizers, method),
            *about_run,
        ],
    )


def _side(source: str, tokenizer: Any, chat_template: str | None, trust_remote_code: bool) -> Side:
    """Gives the tokenizer the chat template if it has none, as a run does. Raises: ChatTemplateError if it loses the answer."""
    config = load_config(source, trust_remote_code=trust_remote_code)
    template = "its own" if tokenizer.chat_template else chat_template
    ensure_chat_template(tokenizer, chat_template)
    opening, ends_turn = "", None
    if tokenizer.chat_template:
        rendered, _ = answer_spans(tokenizer, TALK)
        opening, _, closing = rendered.partition(TALK[0]["content"])
        after = tokenizer.encode(closing.partition(TALK[1]["content"])[2], add_special_tokens=False)
        ends = stop_tokens(tokenizer)
        ends_turn = next((tokenizer.convert_ids_to_tokens(i) for i in after if i in ends), None)
    stops = (
        load_generation_config(source, trust_remote_code=trust_remote_code).eos_token_id
        or tokenizer.eos_token_id
    )
    return Side(
        source=source,
        tokens=len(tokenizer),
        size=model_size(config, trust_remote_code=trust_remote_code),
        chat_template=template,
        opening=opening,
        ends_turn=ends_turn,
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
        stops=[
            tokenizer.convert_ids_to_tokens(i)
            for i in (stops if isinstance(stops, list) else [stops])
            if i is not None
        ],
        context_tokens=getattr(config.get_text_config(), "max_position_embeddings", None),
    )


def _verdict(
    sides: Sequence[Side], vocabularies: VocabularyComparison, text: MeasuredText | None
) -> tuple[str, str]:
    """The method, and the reason in one line."""
    if vocabularies.first_difference is None:
        rows, other_rows = (side.size.vocabulary_rows for side in sides)
        reason = "equal ids are equal tokens, so the whole distributions can be compared"
        if rows != other_rows:
            reason += f"; the heads of {rows} and {other_rows} rows are cut to the {vocabularies.shared_rows} shared"
        return "logits", reason
    first, teacher_token, student_token = vocabularies.first_difference
    unsafe = f"logits would be unsafe (id {first} is {teacher_token!r} in the teacher's, {student_token!r} in the student's)"
    if text is None:
        share = vocabularies.shared_tokens / vocabularies.student_tokens
        return "cross", f"{unsafe}; {share:.0%} of the student's tokens are the teacher's, too"
    if text.with_target < ENOUGH_TARGETS:
        return (
            "text",
            f"{unsafe}, and cross would reach only {text.with_target:.0%} of the positions in your text",
        )
    return (
        "cross",
        f"{unsafe}; across tokenizers the teacher reaches {text.with_target:.1%} of the positions in your text",
    )


def _plan(text: MeasuredText | None, settings: dict[str, Any], tokenizers: Sequence[Any]) -> Plan:
    """The run that `potstill distill` would make of these settings; without data, one over a million of the student's tokens."""
    batch, length, precision = settings["batch_size"], settings["max_length"], settings["precision"]
    a_step = batch * settings["gradient_accumulation_steps"]
    if text is None:
        lengths = [
            len(tokenizer.encode(PROBE, add_special_tokens=False)) for tokenizer in tokenizers
        ]
        teacher_tokens = length * lengths[0] / lengths[1]
        steps = settings["max_steps"] or -(-MILLION // (a_step * length))
        return Plan(
            steps, a_step, length, length, teacher_tokens, teacher_tokens, batch * length, precision
        )
    training = text.of - max(1, round(text.of * HELD_OUT))
    steps = settings["max_steps"] or EPOCHS * -(-training // a_step)
    per_conversation = 1 / text.conversations
    return Plan(
        steps=steps,
        conversations_a_step=a_step,
        tokens=text.tokens * per_conversation,
        supervised=text.supervised_tokens * per_conversation,
        teacher_tokens=text.teacher_tokens * per_conversation,
        teacher_supervised=text.teacher_supervised_tokens * per_conversation,
        largest_batch_tokens=batch * text.longest,
        precision=precision,
    )


def _teacher_bits_per_byte(
    teacher: Any, tokenizers: Sequence[Any], conversations: Sequence[Conversation], length: int
) -> dict[str, float]:
    """How well the teacher foresees the answers when it reads them as it is used to, and as the student will be asked."""
    tokenizer, student_tokenizer = tokenizers
    # Marked as cut off, answers are scored without the end token, which is the template's.
    chosen = [{**row, "cut_off": True} for row in conversations[:SCORED_CONVERSATIONS]]
    bits = {}
    for name, template in (
        ("own", tokenizer.chat_template),
        ("student's", student_tokenizer.chat_template),
    ):
        tokenizer.chat_template = template
        dataset, _ = tokenize_conversations(chosen, tokenizer, max_length=length)
        bits[name] = summarize(score_tokens(teacher, dataset, pad_token_id=tokenizer.pad_token_id))[
            "bits_per_byte"
        ]
    return bits


def _command(
    teacher: str, student: str, data: str | None, method: str, settings: dict[str, Any]
) -> str:
    """What to type, flags only where they are not the default."""
    defaults = inspect.signature(examine).parameters  # which are those of `potstill distill`
    words = ["potstill", "distill", teacher, student, "--data", data or "DATA", "--method", method]
    words += ["--output-dir", f"runs/{Path(student).name}"]
    for name, value in settings.items():
        if value != defaults[name].default:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def _notes_on_pair(sides: Sequence[Side], method: str) -> Iterator[str]:
    teacher, student = sides
    for who, side in (("teacher", teacher), ("student", student)):
        if side.ends_turn and side.ends_turn not in side.stops:
            yield (
                f"the {who}'s chat template ends a turn with {side.ends_turn}, and its generation stops only at "
                f"{', '.join(side.stops)}: it would talk on; add that token to eos_token_id in generation_config.json"
            )
        if side.chat_template and not side.ends_turn:
            yield f"the {who}'s chat template ends an answer with no special token, so nothing teaches the student to stop"
        if not side.chat_template:
            yield f"the {who} has no chat template: conversations need --chat-template plain, or a Jinja file"
    if student.size.parameters >= teacher.size.parameters:
        yield "the student is not smaller than the teacher"
    if method == "logits" and teacher.opening != student.opening:
        yield "the chat templates differ, and the teacher will read the student's: --with-weights shows what that costs it"


def _notes_on_text(
    text: MeasuredText | None, tokenizers: Sequence[Any], method: str
) -> Iterator[str]:
    split = "split differently by two tokenizers of the same tokens: the teacher will read what it is not used to"
    if text is None:
        if method == "logits" and not splits_alike(*tokenizers):
            yield f"some text is {split}"
        return
    measured = text.conversations + text.dropped + text.not_alignable
    for count, what in (
        (text.shortened, "are cut at --max-length, their ends never seen"),
        (text.dropped, "have no answer within --max-length and are left out"),
        (text.split_differently, f"are {split}"),
        (
            text.not_alignable,
            "are left out: for the two tokenizers or chat templates the answer is not the same bytes",
        ),
    ):
        if count:
            yield f"{count} of {measured} conversations {what}"
    if text.with_target < FEW_TARGETS or text.disagreeing > MANY_DISAGREEING:
        worst = ", ".join(f"{token!r} {count}×" for token, count in text.untaught[:3])
        yield (
            f"the two tokenizers cut this text less alike than prose and code usually are; without a target most often: {worst}"
            + (
                f" ({text.untaught_blank:.0%} of all are runs of blanks and line breaks)"
                if text.untaught_blank > 0.1
                else ""
            )
        )


def _notes_on_run(
    sides: Sequence[Side], cost: Cost, card: str | None, longest: int
) -> Iterator[str]:
    for who, side in zip(("teacher", "student"), sides, strict=True):
        if side.context_tokens is not None and longest > side.context_tokens:
            yield f"conversations of up to {longest} tokens are longer than the {side.context_tokens} that the {who} can read"
    room = float("inf") if card is None else CARDS[card.lower()].memory_bytes
    if cost.memory_bytes - cost.activation_memory_bytes > room:
        yield f"both models with the optimizer's state do not fit on one {card}: use several with FSDP, or train adapters (LoRA)"
    elif cost.memory_bytes > room:
        yield f"the run does not fit on one {card}: lower --batch-size, and raise --gradient-accumulation-steps by as much"
