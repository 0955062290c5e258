"""Time reading and encoding of conversations against the bare tokenizer.

    python benchmarks/read.py [--rows 20000] [--tokens 500] [--turns 2] [--model demo]

Rows of random words are written to a file. `bare` calls the tokenizer on the same texts, already
rendered and in memory, in lists of 256: the floor, because no labels come of it.
`render` is the chat template alone, by transformers. `potstill` reads the file, checks the rows,
renders them, finds the answers, tokenizes and writes an Arrow table. Each runs in a process of its
own, so that the memory is its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = "the rain in on a boat while some other people wait under trees".split()  # noqa: SIM905


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write(file, options)
        context = multiprocessing.get_context("spawn")
        found = {}
        for work in (bare, render, potstill):
            with context.Pool(1) as pool:
                found[work.__name__] = pool.apply(measured, (work, str(file), options.model))
    print(f"{options.rows} rows of {options.turns} turns, about {options.tokens} tokens")
    print(f"{'':10}{'seconds':>9}{'tokens/s':>12}{'÷ bare':>9}{'memory growth, MB':>20}")
    floor = found["bare"][0]
    for name, (seconds, tokens, megabytes) in found.items():
        speed = f"{tokens / seconds:,.0f}" if tokens else "–"
        print(f"{name:10}{seconds:9.1f}{speed:>12}{floor / seconds:9.2f}{megabytes:20.0f}")


def write(file: Path, options: Any) -> None:
    dice = random.Random(0)
    with file.open("w") as lines:
        for _ in range(options.rows):
            messages = [
                {
                    "role": ("user", "assistant")[turn % 2],
                    "content": " ".join(dice.choices(WORDS, k=options.tokens // options.turns)),
                }
                for turn in range(options.turns)
            ]
            lines.write(json.dumps({"messages": messages}) + "\n")


def measured(work: Any, file: str, model: str) -> tuple[float, int, float]:
    """Return seconds, tokens and the growth of the peak memory."""
    from potstill.models import load_tokenizer

    tokenizer = load_tokenizer(model)
    prepared = work(file, tokenizer)
    next(prepared)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    tokens = next(prepared)
    seconds = time.perf_counter() - begun
    return seconds, tokens, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def rendered(file: str, tokenizer: Any) -> Any:
    with open(file) as lines:
        for line in lines:
            messages = json.loads(line)["messages"]
            yield tokenizer.apply_chat_template(messages, tokenize=False)


def bare(file: str, tokenizer: Any) -> Any:
    texts = list(rendered(file, tokenizer))
    yield
    tokens = 0
    for start in range(0, len(texts), 256):
        ids = tokenizer(texts[start : start + 256], add_special_tokens=False)["input_ids"]
        tokens += sum(map(len, ids))
    yield tokens


def render(file: str, tokenizer: Any) -> Any:
    yield
    sum(1 for _ in rendered(file, tokenizer))
    yield 0


def potstill(file: str, tokenizer: Any) -> Any:
    import datasets
    import pyarrow  # noqa: F401

    from potstill.data import read_conversations, tokenize_conversations

    datasets.disable_progress_bars()
    yield
    _, counts = tokenize_conversations(read_conversations(file), tokenizer, max_length=100_000)
    yield counts.tokens


if __name__ == "__main__":
    main()
