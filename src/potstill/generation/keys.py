"""From prompts to requests and back to conversations, by way of keys.

A key is a hash of the prompt, the teacher, its template, and how it is sampled. Same key, same answer: by its key an answer is
kept, found again after an interrupt, and seeded.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from potstill.data.conversations import Conversation
from potstill.generation.engine import Answer, Request
from potstill.sampling.sampler import Sampling

SAMPLED_VALUES = 64
"""How many of each weight's values stand for it in a teacher's revision."""


def requests(prompts: Iterable[list[dict[str, Any]]], sampling: Sampling, identity: dict[str, Any]) -> Iterator[Request]:
    """``sampling.samples`` requests a prompt, in order. A prompt that stands there twice is answered twice, differently."""
    decides = [identity, sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.seed]
    asked: Counter[str] = Counter()
    for messages in prompts:
        if sampling.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": sampling.system}, *messages]
        prompt = digest([*decides, messages])
        for _ in range(sampling.samples):
            yield Request(digest([prompt, asked[prompt]]), messages)
            asked[prompt] += 1


def answered(request: Request, answer: Answer, sampling: Sampling) -> Conversation:
    """The request with its answer, ready to learn from: text, the ids that were sampled, and how they were."""
    how = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_new_tokens": sampling.max_new_tokens}
    likely = {} if answer.nats_per_token is None else {"nats_per_token": answer.nats_per_token}
    return {
        "messages": [*request.messages, {"role": "assistant", "content": answer.text}],
        "cut_off": answer.cut_off,
        "teacher_ids": answer.teacher_ids,
        **likely,
        "sampling": {**how, "seed": sampling.seed},
        "key": request.key,
    }


def digest(value: Any) -> str:
    """128 bits of SHA-256 of a value's JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def identify(source: str, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Which teacher this is: its name, and digests of its weights, its tokenizer and its chat template."""
    return {"teacher": source, "revision": _revision(model), **identify_tokenizer(tokenizer)}


def identify_tokenizer(tokenizer: Any) -> dict[str, str]:
    """Digests of a tokenizer and of its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    tokens = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return {"tokenizer": digest(tokens), "chat_template": digest(tokenizer.chat_template)}


def _revision(model: Any) -> str:
    """The weights' own: some values of each, in the precision they are used in. A name or a commit says less."""
    hashed = hashlib.sha256()
    for name, weight in model.state_dict().items():
        values = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED_VALUES)]
        hashed.update(f"{name} {tuple(weight.shape)} {weight.dtype} {values.cpu().double().tolist()}".encode())
    return hashed.hexdigest()[:32]
