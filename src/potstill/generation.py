"""The teacher's text: batches of sampled answers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from potstill.data.chat_templates import render
from potstill.data.conversations import Conversation
from potstill.run_folder import write_whole

Prompt = str | list[dict[str, Any]]
"""What a user says, or a conversation that ends with it."""


def answer_prompts(model: Any, tokenizer: Any, prompts: Sequence[Prompt], **sampling: Any) -> list[Conversation]:
    """Answer all of ``prompts``: conversations ready to learn from, in order. ``sampling`` as in `generate_batches`."""
    return [row for batch in generate_batches(model, tokenizer, prompts, **sampling) for row in batch]


def generate_batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    batch_size: int = 32,
    first_batch: int = 0,
) -> Iterator[list[Conversation]]:
    """Answer ``prompts`` a batch at a time, in order: conversations that end with the model's answer.

    One that the token limit stopped says ``"cut_off": true``. ``temperature`` 0 takes the likeliest token. A batch is seeded by
    its number, so ``first_batch`` goes on where an earlier call stopped, with the same result. Raises: ChatTemplateError.
    """
    ends = _end_tokens(model, tokenizer)
    for number in range(first_batch, -(-len(prompts) // batch_size)):
        asked = [_messages(prompt) for prompt in prompts[number * batch_size :][:batch_size]]
        texts = [render(tokenizer, messages, for_answer=True) for messages in asked]
        encoded = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left")
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
        # The seed is the batch's own business: the caller's random state is left as it was.
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed + number)
            tokens = model.generate(
                **encoded.to(model.device),
                **sampling,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers = tokens[:, encoded["input_ids"].shape[1] :].tolist()
        yield [_conversation(messages, row, tokenizer, ends) for messages, row in zip(asked, answers, strict=True)]


def answer_into(
    file: Path, model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, batch_size: int = 32, **sampling: Any
) -> None:
    """Write `generate_batches` into a JSON Lines file of conversations, and go on with one that was begun.

    A batch is written at once and a torn one made again, so an interrupted call followed by another equals one call.
    """
    kept = _whole_rows(file)
    kept = kept[: len(kept) // batch_size * batch_size]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(kept))
    first = len(kept) // batch_size
    batches = generate_batches(model, tokenizer, prompts, batch_size=batch_size, first_batch=first, **sampling)
    with (
        tqdm(total=len(prompts), initial=len(kept), unit="answer", desc="  answering") as progress,
        file.open("a", encoding="utf-8") as out,
    ):
        for batch in batches:
            out.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in batch))
            out.flush()
            progress.update(len(batch))


def count_rows(file: Path) -> int:
    """Whole rows of a file that `answer_into` wrote; 0 if it is not there."""
    return len(_whole_rows(file))


def _whole_rows(file: Path) -> list[str]:
    """The lines of ``file`` up to the first that was not written to its end."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")  # splitlines would also split inside an answer
    return [line + "\n" for line in itertools.takewhile(lambda line: line.endswith("}"), lines[:-1])]


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _conversation(messages: list[dict[str, Any]], tokens: list[int], tokenizer: Any, ends: set[int]) -> Conversation:
    length = next((i for i, token in enumerate(tokens) if token in ends), None)
    content = tokenizer.decode(tokens[:length], skip_special_tokens=True).strip()
    return {"messages": [*messages, {"role": "assistant", "content": content}], "cut_off": length is None}


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}
