"""What the players say, token by token, and what each of them would have said next at any place of an answer.

V vocabulary. At a place all are asked the same: the prompt, and the answer up to there. A player with the tokens of the one who
answered is given those very tokens; one with other tokens is given the same text in its own, up to the last whole character.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from potstill.data.chat_templates import answer_spans, render
from potstill.generation.local import end_tokens
from potstill.play.players import Player
from potstill.sampling.batch import Batch, Row
from potstill.sampling.sampler import Sampling, sample_tokens, uniforms


@dataclass(frozen=True)
class Candidate:
    """A token that could come next, spelled, and how likely the model holds it."""

    text: str
    probability: float
    written: bool
    """Whether it is the one that stands in the answer."""


def stream_answers(
    players: Sequence[Player], prompt: str, sampling: Sampling
) -> Iterator[list[list[int]]]:
    """The tokens of each player's answer so far, all a token longer each time, until the last of them has ended.

    The token that ends an answer is its last. All draw the same random numbers, so that players who agree say the same.
    """
    answers: list[list[int]] = [[] for _ in players]
    for grown in zip_longest(*(_stream(player, prompt, sampling) for player in players)):
        answers = [old if new is None else new for old, new in zip(answers, grown, strict=True)]
        yield answers


@torch.inference_mode()
def _stream(player: Player, prompt: str, sampling: Sampling) -> Iterator[list[int]]:
    row, numbers = Row(prompt_ids(player, prompt)), uniforms(sampling.seed, sampling.max_new_tokens)
    ends = end_tokens(player.model, player.tokenizer)

    def choose(logits: Tensor, _: Any) -> None:
        uniform = numbers[len(row.tokens)][None]
        row.tokens += sample_tokens(
            logits, uniform, temperature=sampling.temperature, top_p=sampling.top_p
        ).tolist()

    batch = Batch(player.model, player.tokenizer.pad_token_id, choose)
    batch.add([row])
    yield [*row.tokens]
    while len(row.tokens) < sampling.max_new_tokens and row.tokens[-1] not in ends:
        batch.step()
        yield [*row.tokens]


def next_tokens(
    player: Player,
    prompt: str,
    *,
    answered_by: Player,
    answer: Sequence[int],
    place: int,
    count: int = 6,
) -> list[Candidate]:
    """What ``player`` holds likeliest at ``place`` of an answer, ``count`` tokens, likeliest first, at temperature 1.

    The token that stands there is added with its own probability if it is none of these; unless the two players' tokens differ, for
    then it may be no token of this one.
    """
    same = player.tokens == answered_by.tokens
    if same:
        context = [*prompt_ids(player, prompt), *answer[:place]]
    else:
        context = _continued_ids(player, prompt, _text(answered_by, answer[:place]))
    probabilities = _distribution(player.model, context)
    chosen = probabilities.topk(min(count, len(probabilities))).indices.tolist()
    written = answer[place] if same else None
    if written is not None and written not in chosen:
        chosen.append(written)
    return [
        Candidate(player.spell(token), float(probabilities[token]), token == written)
        for token in chosen
    ]


def prompt_ids(player: Player, prompt: str) -> list[int]:
    """The prompt in the player's chat template, up to where its answer begins."""
    text = render(player.tokenizer, [{"role": "user", "content": prompt}], for_answer=True)
    return list(player.tokenizer(text, add_special_tokens=False)["input_ids"])


def _continued_ids(player: Player, prompt: str, begun: str) -> list[int]:
    """The same with the beginning of an answer, which the template lays out as it lays out whole answers."""
    core = begun.strip()
    if not core:
        return prompt_ids(player, prompt)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": core}]
    text, spans = answer_spans(player.tokenizer, turns)
    end = text.index(core, spans[-1][0]) + len(core)
    blanks = begun[len(begun.rstrip()) :]
    return list(player.tokenizer(text[:end] + blanks, add_special_tokens=False)["input_ids"])


def _text(player: Player, tokens: Sequence[int]) -> str:
    pieces = (player.tokens[token] for token in tokens if token < len(player.tokens))
    return b"".join(piece for piece in pieces if piece is not None).decode("utf-8", "ignore")


@torch.inference_mode()
def _distribution(model: Any, context: list[int]) -> Tensor:
    """The model's next-token distribution, ``[V]``."""
    ids = torch.tensor([context], device=model.device)
    logits: Tensor = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1
    ).logits[0, -1]
    return torch.softmax(logits.float(), dim=-1).cpu()
