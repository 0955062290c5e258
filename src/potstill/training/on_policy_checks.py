"""Check, before an on-policy run, that the student can answer and the teacher can correct it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from potstill.alignment import special_ids
from potstill.alignment.stop_tokens import stop_tokens
from potstill.data.batches import Encoded
from potstill.data.prompt_rows import answer_end, prompt_length
from potstill.errors import ConfigError, DataError
from potstill.processes import print_main
from potstill.sampling import end_tokens
from potstill.teachers import reads_new_text


def refuse_impossible(args: Any, objective: Any, dataset: Any) -> None:
    """Raises: ConfigError."""
    teacher = objective.teacher
    if teacher is None:
        raise ConfigError(
            "on_policy with method text: there is no teacher that corrects the student; "
            "use --method logits or cross"
        )
    if not reads_new_text(teacher):
        raise ConfigError(
            "on_policy: the teacher is a capture, which knows only the captured text, or a vLLM "
            "server, which gives only a few tokens of a distribution; give the teacher itself or "
            "the address of potstill serve, or leave out --on-policy"
        )
    alignment = getattr(objective, "alignment", None)
    if alignment not in (None, "pieces", "cells", "push_forward"):
        raise ConfigError(
            f"on_policy with alignment {alignment}: not possible; use pieces, or leave out "
            "--on-policy"
        )
    if not hasattr(dataset, "__len__"):
        raise ConfigError(
            "on_policy with a streamed data set: prompts are chosen by number; give a data set "
            "that has a length"
        )


def answerable(dataset: Any, max_length: int) -> list[int]:
    """Return the rows whose prompt leaves room for an answer. Raises: DataError if none does."""
    lengths = [prompt_length(row["labels"]) for row in dataset]
    prompts = [i for i, length in enumerate(lengths) if length]
    if not prompts:
        raise DataError(
            f"on_policy: none of the {len(lengths)} rows of the data has a prompt that the student "
            "could answer (plain text has none); give conversations, or leave out --on-policy"
        )
    usable = [i for i in prompts if lengths[i] < max_length]
    if not usable:
        raise DataError(
            f"on_policy: all {len(prompts)} prompts have {max_length} tokens or more and leave no "
            "room for an answer; raise --max-length"
        )
    if len(usable) < len(lengths):
        print_main(
            f"note: the student answers {len(usable)} of {len(lengths)} prompts; the others are "
            f"missing, or leave no room within {max_length} tokens"
        )
    return usable


def note_other_ends(objective: Any, ends: set[int]) -> None:
    """Print if a teacher with the student's tokens ends answers with none of the ids ``ends``.

    It would then find every end of the student unlikely, and never teach it to stop.
    """
    teacher, student = objective.teacher.tokenizer, objective.tokenizer
    if teacher is None or hasattr(objective, "alignment"):  # across tokenizers, ends are aligned
        return
    own = set(stop_tokens(teacher))
    if own and own.isdisjoint(ends):
        names = [", ".join(student.convert_ids_to_tokens(sorted(ids))) for ids in (own, ends)]
        print_main(
            f"note: the teacher ends an answer with {names[0]}, the student with {names[1]}: it "
            "will not be taught to stop; give both the same chat template and end token"
        )


def answer_ends(student: Any, tokenizer: Any, dataset: Iterable[Encoded]) -> set[int]:
    """Return the tokens that end an answer. Raises: ConfigError if there are none."""
    special = special_ids(tokenizer)
    counts: dict[int | None, int] = {}
    for row in dataset:
        end = answer_end(row, special)
        counts[end] = counts.get(end, 0) + 1
    configured = end_tokens(student, tokenizer)
    # A rare one may be a token in the middle, of an answer that was cut.
    written = {
        end for end, n in counts.items() if end is not None and n > 0.01 * sum(counts.values())
    }
    missing = written - configured
    if missing:
        names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(missing)))
        print_main(
            f"note: the data's answers end with {names}, which is not an end token of the student; "
            "rollouts end there too"
        )
    if not written | configured:
        raise ConfigError(
            "on_policy: the student cannot end an answer: neither its tokenizer nor its generation "
            "config has an end token, and the data's answers have none; add eos_token to its "
            "tokenizer"
        )
    return written | configured
