"""Measure a student on the answers that it writes itself to held-out prompts.

KL(student ‖ teacher) at the tokens of its own answers says how far it is from its teacher where its
own mistakes lead. Beside it: how many answers end, and how much they repeat themselves.
"""

from __future__ import annotations

from typing import Any

import torch

from potstill.data import BatchLayout
from potstill.data.prompt_rows import prompt_length, with_answer
from potstill.models.heads import (
    hidden_states,
    model_inputs,
    on_device,
    output_head,
    supervised,
)
from potstill.models.vocabulary import padding_id
from potstill.protocols import CausalLM, Tokenizer
from potstill.sampling import RefilledSampler, Sampling
from potstill.sampling.repetition import repeated_grams
from potstill.teachers import LossSettings, StatesTarget, Teacher, reads_new_text

MOST_ANSWERS = MOST_AT_ONCE = 64
ANSWER_TOKENS = 128
COLUMNS = (
    "own_answers",
    "own_ended",
    "own_tokens",
    "own_kl_nats",
    "own_grams",
    "own_repeated",
)


@torch.no_grad()
def measure_own_answers(
    model: CausalLM,
    tokenizer: Tokenizer,
    dataset: Any,
    teacher: Teacher,
    *,
    rows: int,
    most: int = MOST_ANSWERS,
    tokens: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> dict[str, list[float]]:
    """Return sums per conversation of ``dataset``, by name of `COLUMNS`; 0 where none was written.

    The student answers the first ``most`` prompts, each with at most ``tokens`` tokens
    (`ANSWER_TOKENS`), by sampling at temperature 1. KL is over the first ``rows`` of both
    vocabularies. Empty if the teacher cannot read new text, or no conversation has a prompt.
    """
    prompts = _prompts(dataset, most)
    if not prompts or not reads_new_text(teacher):
        return {}
    sampling = Sampling(max_new_tokens=tokens or ANSWER_TOKENS, temperature=1.0, top_p=1.0)
    sampler = RefilledSampler(model, tokenizer, sampling, batch_size=MOST_AT_ONCE)
    seeds = [seed * len(dataset) + i for i in prompts]
    sampled = sampler.sample(list(prompts.values()), seeds)
    sums = {name: [0.0] * len(dataset) for name in COLUMNS}
    encoded = []
    for i, row in zip(prompts, sampled, strict=True):
        unknown = (place for place, token in enumerate(row.tokens) if token >= rows)
        known = row.tokens[: next(unknown, len(row.tokens))]
        repeated, grams = repeated_grams(row.tokens)
        ended = sampler.has_ended(row)
        for name, value in zip(COLUMNS, (1, ended, len(known), 0, grams, repeated), strict=True):
            sums[name][i] = float(value)
        if known:
            encoded.append((i, with_answer(row.prompt, known)))
    layout = BatchLayout(padding_id(tokenizer, model), packed=False)
    for start in range(0, len(encoded), batch_size):
        some = encoded[start : start + batch_size]
        batch = on_device(layout([row for _, row in some]), model.device)
        nats = _reverse_kl(model, teacher, batch, rows)
        for (i, _), one in zip(some, nats, strict=True):
            sums["own_kl_nats"][i] = one
    return sums


def _prompts(dataset: Any, most: int) -> dict[int, list[int]]:
    """Return the first ``most`` prompts by the number of their row."""
    prompts: dict[int, list[int]] = {}
    for i, labels in enumerate(dataset["labels"]):
        length = prompt_length(labels)
        if length and len(prompts) < most:
            prompts[i] = dataset[i]["input_ids"][:length]
    return prompts


def _reverse_kl(model: CausalLM, teacher: Teacher, batch: Any, rows: int) -> list[float]:
    """Return Σ KL(student ‖ teacher) over the supervised tokens of each row, in nats."""
    hidden, labels = supervised(hidden_states(model, model_inputs(batch)), batch["labels"])
    target: Any = teacher.targets(batch)
    counts: Any = (batch["labels"][:, 1:] != -100).sum(1).tolist()
    head: Any = output_head(model, rows=rows)
    loss = LossSettings(divergence="reverse_kl")
    parts = zip(
        *(column.split_with_sizes(counts) for column in (hidden, target.hidden, labels)),
        strict=True,
    )
    return [
        float(StatesTarget(theirs, target.head).summed_loss(ours, head, observed, loss))
        for ours, theirs, observed in parts
    ]
