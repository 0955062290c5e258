"""Score a model on held-out conversations.

N supervised tokens, V vocabulary, k most likely tokens. For each model: KL from the teacher and
negative log-likelihood in nats per token, bits per byte (comparable across tokenizers), and how
often its most likely token is the teacher's. Sums are kept per conversation, because the tokens of
one conversation are not independent: intervals are bootstrapped over conversations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.data import BatchLayout
from potstill.errors import ModelError
from potstill.evaluation.paired import Ratios, interval
from potstill.losses import CallableHead, Head, Projection
from potstill.models.heads import (
    hidden_states,
    model_inputs,
    on_device,
    output_head,
    supervised,
)
from potstill.models.vocabulary import highest_id, refuse_unknown_ids
from potstill.progress import Progress
from potstill.teachers import Target, Teacher
from potstill.teachers.targets import most_likely

OWN_RATIOS = {
    "own_kl_nats_per_token": ("own_kl_nats", "own_tokens"),
    "own_ended": ("own_ended", "own_answers"),
    "own_repeated": ("own_repeated", "own_grams"),
}
INFINITE = 1e10
"""Nats. The losses use a large number for a logit of −∞."""


@dataclass(frozen=True)
class Likeliest:
    """A model's k most likely next tokens, the most likely first, ``[N, k]`` each."""

    ids: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class TokenScores:
    """One model on one data set: numbers for its N supervised tokens, in the data's order."""

    nll: Tensor
    """−log p of the token in the text, nats ``[N]``."""
    kl: Tensor | None
    """KL(teacher ‖ model), nats ``[N]``; None without a teacher of the same vocabulary."""
    agrees: Tensor | None
    """1 where the model's most likely token is the teacher's, else 0 ``[N]``."""
    conversation: Tensor
    """The number of each token's conversation ``[N]``."""
    answer_bytes: Tensor
    """UTF-8 bytes of the supervised text, one number a conversation."""
    likeliest: Likeliest | None = None
    """The model's most likely tokens at each position; None if not requested."""
    teacher_likeliest: Likeliest | None = None
    """The teacher's most likely tokens at each position; None likewise."""
    own: dict[str, list[float]] = field(default_factory=dict)
    """What `measure_own_answers` returned; empty if it was not measured."""


@torch.no_grad()
def score_tokens(
    model: Any,
    dataset: Any,
    *,
    pad_token_id: int,
    teacher: Teacher | None = None,
    rows: int | None = None,
    batch_size: int = 8,
    likeliest: int = 0,
) -> TokenScores:
    """Score every supervised token of tokenized conversations, with one chunk's logits at a time.

    ``rows`` cuts the vocabulary to what it shares with ``teacher`` for KL and agreement; NLL uses
    all of it. ``likeliest`` is the number of most likely tokens that are kept of each model.
    Raises: ModelError if a score is not finite, or a token id is not in a vocabulary.
    """
    head = output_head(model)
    refuse_unknown_ids(model, highest_id(dataset, "input_ids"), role="model")
    if teacher is not None and teacher.model is not None:
        refuse_unknown_ids(teacher.model, highest_id(dataset, "input_ids"), role="teacher")
    layout = BatchLayout(pad_token_id, packed=False)
    parts: list[tuple[Tensor, ...]] = []
    starts = range(0, len(dataset), batch_size)
    with Progress("scoring", len(starts), unit="batches") as progress:
        for start in starts:
            encoded = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            batch = on_device(layout(encoded), model.device)
            hidden, labels = supervised(hidden_states(model, model_inputs(batch)), batch["labels"])
            target = None if teacher is None else teacher.targets(batch)
            conversation = start + (batch["labels"][:, 1:] != -100).nonzero()[:, 0]
            scores = _score_positions(hidden, head, labels, target, rows, likeliest)
            parts.append((conversation, *scores))
            progress.update()
    columns = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    conversation, nll, kl, agrees, *next_tokens = columns
    known = teacher is not None
    _refuse_infinite(nll, "−log p of the text", model)
    _refuse_infinite(kl, "divergence from the teacher", model)
    return TokenScores(
        nll,
        kl if known else None,
        agrees if known else None,
        conversation,
        torch.tensor(dataset["answer_bytes"]),
        Likeliest(*next_tokens[:2]) if likeliest else None,
        Likeliest(*next_tokens[2:]) if likeliest and known else None,
    )


@torch.no_grad()
def score_teacher(
    teacher: Teacher, dataset: Any, *, pad_token_id: int, batch_size: int = 8
) -> TokenScores:
    """Score a teacher's own prediction of tokenized conversations, from its targets alone.

    Works for a teacher without a model in this process. KL and agreement are None.
    Raises: ModelError as `score_tokens`.
    """
    if teacher.model is not None:
        refuse_unknown_ids(teacher.model, highest_id(dataset, "input_ids"), role="teacher")
    layout = BatchLayout(pad_token_id, packed=False)
    device = "cpu" if teacher.model is None else teacher.model.device
    nll, conversation = [], []
    for start in range(0, len(dataset), batch_size):
        encoded = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        batch = on_device(layout(encoded), device)
        chosen = batch["labels"][:, 1:] != -100
        nll.append(teacher.targets(batch).label_nll(batch["labels"][:, 1:][chosen]).cpu())
        conversation.append(start + chosen.nonzero()[:, 0].cpu())
    answer_bytes, all_nll = torch.tensor(dataset["answer_bytes"]), torch.cat(nll)
    _refuse_infinite(all_nll, "−log p of the text by the teacher", teacher.model)
    return TokenScores(all_nll, None, None, torch.cat(conversation), answer_bytes)


def _refuse_infinite(values: Tensor | None, what: str, model: Any) -> None:
    """Raises: ModelError for NaN and infinity, which neither JSON nor a mean can hold."""
    if values is None:
        return
    count = len(values) - int((values.abs() < INFINITE).sum())
    if count:
        name = "the teacher" if model is None else model.config.name_or_path or type(model).__name__
        dtype = "" if model is None else f" in {str(model.dtype).removeprefix('torch.')}"
        raise ModelError(
            f"{name}: the {what} is NaN or infinite{dtype} for {count} of {len(values)} tokens; "
            "use --precision bf16 or fp32, or check the weights for NaN and −∞"
        )


def summarize(scores: TokenScores, *, seed: int = 0) -> dict[str, Any]:
    """Return the means of `TOKEN_MEASURES`, with 95 % intervals of 2 000 resamplings.

    Conversations are resampled. A measure that needs a teacher is None without one. ``tokens`` and
    ``bytes`` are the amounts measured.
    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    sums = conversation_sums(scores)
    pairs = measure_ratios(sums)
    ratios = {name: pair and Ratios(pair[0][None], pair[1][None]) for name, pair in pairs.items()}
    summary: dict[str, Any] = {name: ratio and ratio.value for name, ratio in ratios.items()}
    summary |= {"tokens": int(sum(sums["tokens"])), "bytes": int(sum(sums["bytes"]))}
    intervals = {name: ratio and interval(ratio, seed=seed) for name, ratio in ratios.items()}
    summary["ci95"] = {name: ends and list(ends) for name, ends in intervals.items()}
    return summary


def conversation_sums(scores: TokenScores) -> dict[str, Any]:
    """Return tokens, bytes, nll_nats, kl_nats and agreeing_tokens per conversation.

    They suffice to compare two models later. The last two are None without a teacher.
    """

    def sums(values: Tensor | None) -> list[float] | None:
        if values is None:
            return None
        zeros = torch.zeros(len(scores.answer_bytes), dtype=torch.float64)
        return zeros.index_add_(0, scores.conversation, values.double()).tolist()

    return {
        "tokens": sums(torch.ones_like(scores.nll)),
        "bytes": scores.answer_bytes.double().tolist(),
        "nll_nats": sums(scores.nll),
        "kl_nats": sums(scores.kl),
        "agreeing_tokens": sums(scores.agrees),
        **scores.own,
    }


def measure_ratios(sums: dict[str, Any]) -> dict[str, tuple[Any, Any] | None]:
    """Return (numerator, denominator) per conversation of each of `TOKEN_MEASURES`.

    Those of `OWN_MEASURES` are there if they were measured.
    """
    arrays = {
        name: None if column is None else np.asarray(column, dtype=np.float64)
        for name, column in sums.items()
    }
    tokens, kl, agreeing = arrays["tokens"], arrays["kl_nats"], arrays["agreeing_tokens"]
    nll: Any = arrays["nll_nats"]
    own = {
        name: (arrays[numerator], arrays[denominator])
        for name, (numerator, denominator) in OWN_RATIOS.items()
        if numerator in arrays
    }
    return {
        "kl_nats_per_token": None if kl is None else (kl, tokens),
        "nll_nats_per_token": (nll, tokens),
        "bits_per_byte": (nll / math.log(2), arrays["bytes"]),
        "top1_agreement": None if agreeing is None else (agreeing, tokens),
        **own,
    }


def gap_closed(
    teacher: dict[str, Any], before: dict[str, Any], after: dict[str, Any]
) -> float | None:
    """Return (before − after) / (before − teacher) in bits per byte; 1 is as good as the teacher.

    None if there was no gap.
    """
    name = "bits_per_byte"
    gap = before[name] - teacher[name]
    return float((before[name] - after[name]) / gap) if gap > 0 else None


def _score_positions(
    hidden: Tensor,
    head: Head | CallableHead,
    labels: Tensor,
    target: Target | None,
    rows: int | None,
    likeliest: int,
) -> tuple[Tensor, ...]:
    """Return NLL, KL and agreement ``[N]``, then ids and probabilities ``[N, k]`` of both models.

    Logits exist for one chunk at a time.
    """
    nll, kl, agrees = (torch.zeros(len(labels), device=hidden.device) for _ in range(3))
    shape = (len(labels), likeliest)
    ids, teacher_ids = (torch.zeros(shape, dtype=torch.int32, device=hidden.device) for _ in "12")
    probabilities, teacher_probabilities = (torch.zeros(shape, device=hidden.device) for _ in "12")
    score = None if target is None else target.block_scores(labels, rows=rows, likeliest=likeliest)
    for positions, logits in Projection(hidden, head, observed=labels).blocks():
        nll[positions] = torch.nn.functional.cross_entropy(
            logits, labels[positions], reduction="none"
        )
        ids[positions], probabilities[positions] = most_likely(logits, likeliest)
        if score is not None:
            block = score(positions, logits)
            kl[positions], agrees[positions] = block.kl, block.agrees
            teacher_ids[positions] = block.ids
            teacher_probabilities[positions] = block.probabilities
    return nll, kl, agrees, ids, probabilities, teacher_ids, teacher_probabilities
