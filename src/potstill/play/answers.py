"""Stream the answers of several models, and return what each predicts at a position of an answer.

V vocabulary size. At a position, all models get the same prompt and the same beginning of the
answer. A model with the same tokens as the answering model gets its token ids. Another model gets
the text in its own tokens, up to the last complete character.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from potstill.data.answers import render_answers
from potstill.data.chat_templates import render
from potstill.models.vocabulary import padding_id
from potstill.play.players import Player
from potstill.protocols import CausalLM
from potstill.sampling import end_tokens
from potstill.sampling.batch import AnswerBatch, Row
from potstill.sampling.sampler import Sampling, sample_tokens, uniforms


@dataclass(frozen=True)
class Candidate:
    """Describe a possible next token."""

    text: str
    probability: float
    written: bool
    """True if it is the token in the answer."""


def stream_answers(
    players: Sequence[Player], prompt: str, sampling: Sampling
) -> Iterator[list[list[int]]]:
    """Yield the tokens of all answers so far, after every new token, until all answers have ended.

    The last token is the one that ends the answer. All models use the same random numbers, so that
    equal models give equal answers.
    """
    answers: list[list[int]] = [[] for _ in players]
    for latest in zip_longest(*(_stream(player, prompt, sampling) for player in players)):
        answers = [old if new is None else new for old, new in zip(answers, latest, strict=True)]
        yield answers


@torch.inference_mode()
def _stream(player: Player, prompt: str, sampling: Sampling) -> Iterator[list[int]]:
    row, numbers = Row(prompt_ids(player, prompt)), uniforms(sampling.seed, sampling.max_new_tokens)
    ends = end_tokens(player.model, player.tokenizer)

    def choose(logits: Tensor, _: Sequence[Row]) -> None:
        uniform, temperature = numbers[len(row.tokens)][None], sampling.temperature
        tokens = sample_tokens(logits, uniform, temperature=temperature, top_p=sampling.top_p)
        row.tokens += tokens.tolist()

    batch = AnswerBatch(player.model, padding_id(player.tokenizer, player.model), choose)
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
    """Return the ``count`` most likely tokens of ``player`` at position ``place`` of an answer.

    Probabilities are at temperature 1, the most likely token comes first. The written token is
    added at the end if it is not among them, unless the two models have different tokens.
    """
    same_tokens = player.tokens == answered_by.tokens
    if same_tokens:
        context = [*prompt_ids(player, prompt), *answer[:place]]
    else:
        context = _continued_ids(player, prompt, _text(answered_by, answer[:place]))
    probabilities = _distribution(player.model, context)
    chosen = probabilities.topk(min(count, len(probabilities))).indices.tolist()
    written = answer[place] if same_tokens else None
    if written is not None and written not in chosen:
        chosen.append(written)
    return [
        Candidate(player.spell(token), float(probabilities[token]), token == written)
        for token in chosen
    ]


def prompt_ids(player: Player, prompt: str) -> list[int]:
    """Return the token ids of the prompt in the player's chat template, up to the answer."""
    text = render(player.tokenizer, [{"role": "user", "content": prompt}], for_answer=True)
    return list(player.tokenizer(text, add_special_tokens=False)["input_ids"])


def _continued_ids(player: Player, prompt: str, answer_start: str) -> list[int]:
    """Return the ids of the prompt and the beginning of an answer, in the player's template."""
    stripped = answer_start.strip()
    if not stripped:
        return prompt_ids(player, prompt)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": stripped}]
    rendered = render_answers(player.tokenizer, turns)
    text = rendered.text
    end = text.index(stripped, rendered.answers[-1].start) + len(stripped)
    white_space = answer_start[len(answer_start.rstrip()) :]
    return list(player.tokenizer(text[:end] + white_space, add_special_tokens=False)["input_ids"])


def _text(player: Player, tokens: Sequence[int]) -> str:
    pieces = (player.tokens[token] for token in tokens if token < len(player.tokens))
    return b"".join(piece for piece in pieces if piece is not None).decode("utf-8", "ignore")


@torch.inference_mode()
def _distribution(model: CausalLM, context: list[int]) -> Tensor:
    """Return the model's next-token distribution, ``[V]``."""
    ids = torch.tensor([context], device=model.device)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1)
    logits: Tensor = output.logits[0, -1]
    return torch.softmax(logits.float(), dim=-1).cpu()
