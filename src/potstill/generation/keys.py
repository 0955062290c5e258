"""Turn prompts into requests with keys, and answers into conversations.

A key is a hash of the prompt, the teacher, its chat template and the sampling settings. It decides
the answer: an answer is stored, found after an interrupt, and seeded by its key.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from potstill.data.conversations import Conversation
from potstill.generation.engine import Answer, Request
from potstill.models.quantized import stored_tensors
from potstill.protocols import CausalLM, Tokenizer
from potstill.sampling.sampler import Sampling

SAMPLED_VALUES = 64
"""Number of values of each weight tensor in the hash of a teacher's weights."""


def requests(
    prompts: Iterable[Conversation | list[dict[str, Any]]],
    sampling: Sampling,
    identity: Mapping[str, Any],
) -> Iterator[Request]:
    """Yield `sampling.samples` requests per prompt, in order. Repeated prompts get new keys.

    A prompt is a list of messages, or a conversation with ``messages`` and perhaps ``tools``.
    """
    settings = [sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.seed]
    count: Counter[str] = Counter()
    for asked in prompts:
        messages, tools = (asked, None) if isinstance(asked, list) else _parts(asked)
        if sampling.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": sampling.system}, *messages]
        prompt = digest([identity, *settings, messages, *([tools] if tools else [])])
        for _ in range(sampling.samples):
            yield Request(digest([prompt, count[prompt]]), messages, tools)
            count[prompt] += 1


def _parts(asked: Conversation) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    return asked["messages"], asked.get("tools") or None


def answered(request: Request, answer: Answer, sampling: Sampling) -> Conversation:
    """Return the conversation with its answer, the sampled token ids and the sampling settings."""
    names = ("temperature", "top_p", "max_new_tokens", "seed")
    tools = {"tools": request.tools} if request.tools else {}
    nats = {} if answer.nats_per_token is None else {"nats_per_token": answer.nats_per_token}
    return {
        "messages": [*request.messages, {"role": "assistant", "content": answer.text}],
        **tools,
        "cut_off": answer.cut_off,
        "teacher_ids": answer.teacher_ids,
        **nats,
        "sampling": {name: getattr(sampling, name) for name in names},
        "key": request.key,
    }


def digest(value: object) -> str:
    """Return 128 bits of the SHA-256 hash of the value's JSON, in hexadecimal."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def identify(source: str, model: CausalLM, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the teacher's name and hashes of its weights, tokenizer and chat template."""
    return {"teacher": source, "revision": _hash_weights(model), **identify_tokenizer(tokenizer)}


def identify_tokenizer(tokenizer: Tokenizer) -> dict[str, str]:
    """Return hashes of the tokenizer and of its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    tokens = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return {"tokenizer": digest(tokens), "chat_template": digest(tokenizer.chat_template)}


def _hash_weights(model: CausalLM) -> str:
    """Hash some values of each weight in its dtype: a name or a commit does not identify them."""
    hashed = hashlib.sha256()
    for name, weight in stored_tensors(model):
        values = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED_VALUES)]
        numbers = values.cpu().double().tolist()
        hashed.update(f"{name} {tuple(weight.shape)} {weight.dtype} {numbers}".encode())
    return hashed.hexdigest()[:32]
