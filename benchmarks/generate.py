"""Local generation: the refilled batch against a plain loop of `model.generate` over padded batches of 32.

    python benchmarks/generate.py [--prompts 400] [--max-new-tokens 256]

SmolLM2-135M-Instruct in bfloat16 answers the demo's prompts, in the file's order, at temperature 0.7 and top-p 0.95. Ours answers
first; then the plain loop, whose every row is made to stop at the length that ours had for that prompt, so that both do the same
work. A token is one of the answers' own, the end token included. Both run in one process, after a warm-up.
"""

from __future__ import annotations

import argparse
import time
from importlib import resources
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from potstill import load_model
from potstill.data import read_prompts
from potstill.data.chat_templates import render
from potstill.generation import LocalEngine, Request, Sampling, requests

BATCH = 32


class Lengths(StoppingCriteria):
    """Stops each row at a length of its own, counted from the end of the prompts."""

    def __init__(self, prompt_columns: int, lengths: list[int]) -> None:
        self.prompt_columns, self.lengths = prompt_columns, torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        return input_ids.shape[1] - self.prompt_columns >= self.lengths


def plain_loop(model: Any, tokenizer: Any, asked: list[Request], lengths: list[int], sampling: Sampling) -> None:
    texts = [render(tokenizer, request.messages, for_answer=True) for request in asked]
    for start in range(0, len(texts), BATCH):
        encoded = tokenizer(
            texts[start : start + BATCH], add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left"
        )
        stop = Lengths(encoded["input_ids"].shape[1], lengths[start : start + BATCH])
        model.generate(
            **encoded,
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
            max_new_tokens=sampling.max_new_tokens,
            stopping_criteria=StoppingCriteriaList([stop]),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    options = parser.parse_args()
    model, tokenizer = load_model("demo", dtype="bfloat16", device="cpu")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    sampling = Sampling(max_new_tokens=options.max_new_tokens)
    with resources.as_file(resources.files("potstill.data") / "demo_prompts.jsonl") as path:
        prompts = [row["messages"] for row in read_prompts(path)][-options.prompts :]
    engine = LocalEngine(model, tokenizer, sampling, batch_size=BATCH)
    asked = list(requests(prompts, sampling, {}))
    plain_loop(model, tokenizer, asked[:2], [3, 3], sampling)
    seconds = {}
    begun = time.perf_counter()
    units = (asked[start : start + engine.unit_size] for start in range(0, len(asked), engine.unit_size))
    answers = [answer for unit in engine.answer(units) for answer in unit]
    seconds["potstill, refilled batch"] = time.perf_counter() - begun
    lengths = [len(answer.teacher_ids or ()) for answer in answers]
    model.generation_config.eos_token_id = None
    begun = time.perf_counter()
    with torch.inference_mode():
        plain_loop(model, tokenizer, asked, lengths, sampling)
    seconds["model.generate, batches of 32"] = time.perf_counter() - begun
    slowest = max(seconds.values())
    print(f"{len(asked)} prompts, {sum(lengths)} tokens, {min(lengths)} to {max(lengths)} an answer; torch {torch.__version__}")
    print("| contender | seconds | tokens/s | × faster |\n|---|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.1f} | {sum(lengths) / value:.0f} | {slowest / value:.2f} |")


if __name__ == "__main__":
    main()
