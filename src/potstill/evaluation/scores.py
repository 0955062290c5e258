"""Was the student helped, and is that more than chance?

N supervised tokens, V vocabulary, k likeliest tokens. On held-out conversations, for each model: KL from the teacher and negative
log-likelihood in nats a token, bits per byte (which can be compared across tokenizers), and how often its first choice is the
teacher's. Sums are kept a conversation apart, because tokens of one conversation are not independent: intervals are bootstrapped
over conversations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from potstill.data import BatchLayout
from potstill.evaluation.paired import Ratios, interval
from potstill.models.heads import hidden_states, model_inputs, output_head, supervised
from potstill.losses import CallableHead, Head, Projection
from potstill.teachers import Target, Teacher
from potstill.teachers.targets import most_likely


@dataclass(frozen=True)
class Likeliest:
    """The k tokens that a model holds likeliest to come next, the likeliest first."""

    ids: Tensor
    """``[N, k]``"""
    probabilities: Tensor
    """``[N, k]``"""


@dataclass(frozen=True)
class TokenScores:
    """One model on one data set, a number a supervised token, in the data's order; conversation numbers beside them."""

    nll: Tensor
    """−log p of the token that the text has, nats ``[N]``."""
    kl: Tensor | None
    """KL(teacher ‖ model), nats ``[N]``; None without a teacher of the same vocabulary."""
    agrees: Tensor | None
    """Whether the model's likeliest token is the teacher's ``[N]``."""
    conversation: Tensor
    """Which conversation each token is of ``[N]``."""
    answer_bytes: Tensor
    """UTF-8 bytes of text to learn, one number a conversation."""
    likeliest: Likeliest | None = None
    """What the model would have said in each token's place; None if it was not asked for."""
    teacher_likeliest: Likeliest | None = None
    """What the teacher would have said."""


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
    """Score every supervised token of tokenized conversations (`potstill.data.tokenize_conversations`).

    ``rows`` cuts the model's vocabulary to what it shares with ``teacher``, where the two are compared; how well the text is
    predicted is asked of all of it. ``likeliest`` is how many of each model's likeliest tokens are kept. Never holds more than a
    chunk's logits.
    """
    head = output_head(model)
    layout = BatchLayout(pad_token_id, packed=False)
    parts: list[tuple[Tensor, ...]] = []
    for start in tqdm(range(0, len(dataset), batch_size), desc="  scoring", unit="batch", delay=3, leave=False):
        batch = layout([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        hidden, labels = supervised(hidden_states(model, model_inputs(batch)), batch["labels"])
        target = None if teacher is None else teacher.targets(batch)
        conversation = start + (batch["labels"][:, 1:] != -100).nonzero()[:, 0]
        parts.append((conversation, *_score_rows(hidden, head, labels, target, rows, likeliest)))
    conversation, nll, kl, agrees, *next_tokens = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    known = teacher is not None
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
    """
    layout = BatchLayout(pad_token_id, packed=False)
    device = "cpu" if teacher.model is None else teacher.model.device
    nll, conversation = [], []
    for start in range(0, len(dataset), batch_size):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        batch = {name: tensor.to(device) for name, tensor in layout(rows).items()}
        chosen = batch["labels"][:, 1:] != -100
        nll.append(teacher.targets(batch).label_nll(batch["labels"][:, 1:][chosen]).cpu())
        conversation.append(start + chosen.nonzero()[:, 0].cpu())
    answer_bytes = torch.tensor(dataset["answer_bytes"])
    return TokenScores(torch.cat(nll), None, None, torch.cat(conversation), answer_bytes)


def summarize(scores: TokenScores, *, seed: int = 0) -> dict[str, Any]:
    """The means of `TOKEN_MEASURES`, with 95 % percentile intervals from 2 000 resamplings of the conversations.

    A measure that needs a teacher is None without one. ``tokens`` and ``bytes`` say over how much the means were taken.
    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    sums = conversation_sums(scores)
    ratios = {name: pair and Ratios(pair[0][None], pair[1][None]) for name, pair in measure_ratios(sums).items()}
    summary: dict[str, Any] = {name: ratio and ratio.value for name, ratio in ratios.items()}
    summary |= {"tokens": int(sum(sums["tokens"])), "bytes": int(sum(sums["bytes"]))}
    summary["ci95"] = {name: ratio and list(interval(ratio, seed=seed)) for name, ratio in ratios.items()}
    return summary


def conversation_sums(scores: TokenScores) -> dict[str, Any]:
    """What the scores add up to in each conversation: enough to compare two models later, without either.

    ``tokens``, ``bytes``, ``nll_nats``, ``kl_nats`` and ``agreeing_tokens``, a number a conversation; the last two None without a
    teacher.
    """

    def added(values: Tensor | None) -> list[float] | None:
        if values is None:
            return None
        zeros = torch.zeros(len(scores.answer_bytes), dtype=torch.float64)
        return zeros.index_add_(0, scores.conversation, values.double()).tolist()

    return {
        "tokens": added(torch.ones_like(scores.nll)),
        "bytes": scores.answer_bytes.double().tolist(),
        "nll_nats": added(scores.nll),
        "kl_nats": added(scores.kl),
        "agreeing_tokens": added(scores.agrees),
    }


def measure_ratios(sums: dict[str, Any]) -> dict[str, tuple[Any, Any] | None]:
    """Each of `TOKEN_MEASURES` as what is divided by what, a number a conversation, from `conversation_sums`."""
    arrays = {name: None if column is None else np.asarray(column, dtype=np.float64) for name, column in sums.items()}
    tokens, kl, agreeing = arrays["tokens"], arrays["kl_nats"], arrays["agreeing_tokens"]
    nll: Any = arrays["nll_nats"]
    return {
        "kl_nats_per_token": None if kl is None else (kl, tokens),
        "nll_nats_per_token": (nll, tokens),
        "bits_per_byte": (nll / math.log(2), arrays["bytes"]),
        "top1_agreement": None if agreeing is None else (agreeing, tokens),
    }


def gap_closed(teacher: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """(before − after) / (before − teacher) in bits a byte, which tokenizers do not change: 1 is as good as the teacher.

    None if there was no gap.
    """
    name = "bits_per_byte"
    gap = before[name] - teacher[name]
    return float((before[name] - after[name]) / gap) if gap > 0 else None


def _score_rows(
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
        nll[positions] = torch.nn.functional.cross_entropy(logits, labels[positions], reduction="none")
        ids[positions], probabilities[positions] = most_likely(logits, likeliest)
        if score is not None:
            block = score(positions, logits)
            kl[positions], agrees[positions] = block.kl, block.agrees
            teacher_ids[positions] = block.ids
            teacher_probabilities[positions] = block.probabilities
    return nll, kl, agrees, ids, probabilities, teacher_ids, teacher_probabilities
