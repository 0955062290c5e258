"""Measure a training step with the teacher in this process, and behind `potstill serve`.

    python benchmarks/serve.py [--steps 12] [--teacher demo] [--student-layers 15]

Both share the cores of this machine: the worst case for a server. The steps alternate between the
two, two at a time, so that other load meets both. Both students see the same batches, and the table
compares their losses and final weights. ``overhead`` is the median of the ratios of neighboring
pairs of steps; the floor is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

CONVERSATIONS = 8
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="runs/demo/data/train/conversations.jsonl")
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--student-layers", type=int, default=15)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    if not Path(options.data).is_file():
        sys.exit(f"{options.data}: not there; run `potstill demo` first, or give --data")
    with serving(options) as url:
        measure(options, {"in this process": options.teacher, "served": url})


@contextlib.contextmanager
def serving(options: Any) -> Iterator[str]:
    flags = ["--port", "0", "--precision", options.precision]
    command = [sys.executable, "-m", "potstill", "serve", options.teacher, *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield next(word for word in server.stdout.readline().split() if word.startswith("http"))
    finally:
        server.kill()
        server.wait()


def measure(options: Any, sources: dict[str, str]) -> None:
    from potstill.training.kept_memory import keep_freed_memory

    keep_freed_memory()
    runs = {name: steps_of(options, source) for name, source in sources.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    losses: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(0, WARM_UP + options.steps, 2):
        for name, steps in runs.items():
            begun = time.perf_counter()
            losses[name] += [next(steps), next(steps)]
            if number >= WARM_UP:
                seconds[name].append((time.perf_counter() - begun) / 2)
    local, served = seconds.values()
    ratios = [one / other for one, other in zip(served, local, strict=True)]
    print("| teacher | seconds a step (median) | overhead | largest difference of the loss |")
    print("|---|---|---|---|")
    first = next(iter(losses.values()))
    for name in runs:
        overhead = 1.0 if name == "in this process" else statistics.median(ratios)
        off = max(abs(one - other) for one, other in zip(losses[name], first, strict=True))
        print(f"| {name} | {statistics.median(seconds[name]):.2f} | {overhead:.2f} | {off:.2g} |")
    print(f"\nratios: {', '.join(f'{ratio:.2f}' for ratio in sorted(ratios))}")


def steps_of(options: Any, source: str) -> Iterator[float]:
    """Take a training step at each `next`; yield its loss in nats per token."""
    from potstill import keep_layers, load_model
    from potstill.data import IGNORED, read_conversations, tokenize_conversations
    from potstill.models import dtype_of
    from potstill.teachers import open_teacher
    from potstill.training import DistillationConfig, make_objective
    from potstill.training.prefetch import with_prefetching

    model, tokenizer = load_model(options.teacher, dtype="float32", device="cpu")
    student = keep_layers(model, options.student_layers).train()
    teacher = open_teacher(source, dtype=dtype_of(options.precision), device="cpu")
    config = DistillationConfig(method="logits", output_dir="unused", use_cpu=True, report_to=[])
    objective = make_objective(config, student, tokenizer, teacher, tokenizer)
    rows = list(tokenize_conversations(read_conversations(options.data), tokenizer)[0])
    layout = with_prefetching(objective.layout, objective, workers=0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    starts = range(0, len(rows) - CONVERSATIONS + 1, CONVERSATIONS)
    batches = [rows[start : start + CONVERSATIONS] for start in starts]
    upcoming = layout(batches[0])
    number = 0
    while True:
        number += 1
        # As accelerate does: the next batch is laid out before the step on this one.
        batch, upcoming = upcoming, layout(batches[number % len(batches)])
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            nats = objective.summed_loss(student, batch)
        loss = nats / (batch["labels"][:, 1:] != IGNORED).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss)


if __name__ == "__main__":
    main()
