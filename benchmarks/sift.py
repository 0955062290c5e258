"""Measure reading, filters and near-duplicate removal: rows per second, and peak memory.

    python benchmarks/sift.py [--rows 1000000] [--words 60]

The rows are synthetic: words drawn by Zipf's law, one answer in fifty a near copy of the one
before, one in a hundred empty, cut off or looping. Writing them is not measured. Memory is the peak
of the measured process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill.generation.dataset import write_dataset
from potstill.generation.filters import cut_off, empty, refusal, repetition_loop

FILTERS = {
    "empty": empty,
    "cut_off": cut_off,
    "repetition_loop": repetition_loop,
    "refusal": refusal,
}


def write_rows(file: Path, rows: int, words: int) -> None:
    chance = random.Random(0)
    vocabulary = [f"word{number}" for number in range(20_000)]
    weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(len(vocabulary))))
    text = ""
    with file.open("w", encoding="utf-8") as out:
        for number in range(rows):
            if number % 50 == 49:
                text += " again"
            else:
                length = chance.randrange(words // 2, 3 * words // 2)
                text = " ".join(chance.choices(vocabulary, cum_weights=weights, k=length))
            said = {0: "", 1: "on and on " * 20}.get(number % 300, text)
            turns = [("user", f"question {number}"), ("assistant", said)]
            messages = [{"role": role, "content": content} for role, content in turns]
            out.write(
                json.dumps(
                    {"messages": messages, "cut_off": number % 300 == 2, "key": f"{number:032x}"}
                )
                + "\n"
            )


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def measure(file: Path) -> None:
    begun = time.perf_counter()
    counts = write_dataset(file.parent, read_rows(file), FILTERS, similarity=0.8)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows = sum(counts.values())
    print(
        f"{rows} rows in {seconds:.0f} s: {rows / seconds:.0f} rows/s, peak memory {peak:.2f} GiB"
    )
    print(", ".join(f"{name} {count}" for name, count in counts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, options.rows, options.words)
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(file,))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
