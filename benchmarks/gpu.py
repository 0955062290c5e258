"""Measure the distillation loss on a GPU, at the sizes of Llama 3.2 and Qwen 2.5: time and memory.

    python benchmarks/gpu.py [--tokens 8192] [--rounds 5] [--output gpu.json]

Rivals and floor are those of benchmarks/loss.py, in bfloat16. The floor is the four matrix products
alone. "torch's operations" is potstill with POTSTILL_KERNELS=off. Seconds are medians, taken in
turns; a ratio is the median of the ratios of the rounds. Memory is the peak that the call adds to
its inputs, the gradients included. The table is printed, and written as JSON with the card's name.

    python benchmarks/gpu.py --device cpu --tokens 32 --shrink 64      # tries the script itself
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import loss as benchmark
import torch

PAIRS = {  # vocabulary, hidden sizes of student and teacher
    "Llama 3.2 3B → 1B": (128_256, 2048, 3072),
    "Qwen 2.5 7B → 1.5B": (151_665, 1536, 3584),
}
TORCHS = "potstill, torch's operations"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shrink", type=int, default=1, help="divides all sizes")
    parser.add_argument("--divergences", default="forward_kl,jensen_shannon")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    card = torch.cuda.get_device_name() if on_gpu else "a CPU, which only tries the script"
    print(f"{card}, torch {torch.__version__}, {options.tokens} tokens, bfloat16")
    found: dict[str, Any] = {"card": card, "torch": torch.__version__, "tokens": options.tokens}
    with torch.device(options.device):
        for name, sizes in PAIRS.items():
            vocabulary, student, teacher = (size // options.shrink for size in sizes)
            inputs = random_inputs(options.tokens, vocabulary, student, teacher)
            for divergence in options.divergences.split(","):
                print(f"\n## {name}, {divergence}, V = {vocabulary}\n")
                found[f"{name}, {divergence}"] = measure(inputs, divergence, options.rounds)
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def random_inputs(tokens: int, vocabulary: int, student: int, teacher: int) -> benchmark.Inputs:
    """Return rows whose logits have a standard deviation of 3."""
    torch.manual_seed(0)
    tensors = []
    for size in (student, teacher):
        tensors.append(3 * torch.randn(tokens, size))
        tensors.append(torch.randn(vocabulary, size) * size**-0.5)
    labels = torch.randint(vocabulary, (tokens,))
    return benchmark.Inputs(*(one.bfloat16() for one in tensors), labels)


def measure(inputs: benchmark.Inputs, divergence: str, rounds: int) -> dict[str, dict[str, float]]:
    """Print a table; return the numbers of each method."""
    methods = {name: run for name, run in benchmark.METHODS.items() if benchmark.available(name)}
    methods[TORCHS] = methods["potstill"]
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    peak: dict[str, float] = {}
    for round_ in range(rounds + 1):  # the first warms up and compiles
        for name in list(methods):
            try:
                taken, peak[name] = one_call(methods[name], name, inputs, divergence)
            except torch.OutOfMemoryError:
                print(f"{name}: not enough memory")
                del methods[name], seconds[name]
                continue
            if round_:
                seconds[name].append(taken)
    print("| | ms | ÷ floor | ÷ potstill | peak MB |\n|---|---|---|---|---|")
    rows = {}
    for name, taken in seconds.items():
        milliseconds = 1e3 * statistics.median(taken)
        ratios = [benchmark.ratio(taken, seconds[other]) for other in ("floor", "potstill")]
        print(f"| {name} | {milliseconds:.1f} | {' | '.join(ratios)} | {peak[name]:.0f} |")
        rows[name] = {"milliseconds": milliseconds, "÷ floor": float(ratios[0]), "MB": peak[name]}
    return rows


def one_call(
    run: benchmark.Method, name: str, inputs: benchmark.Inputs, divergence: str
) -> tuple[float, float]:
    """Return seconds and peak megabytes (0 on a CPU)."""
    on_gpu = inputs.labels.is_cuda
    os.environ["POTSTILL_KERNELS"] = "off" if name == TORCHS else "auto"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    begun = time.perf_counter()
    results = run(inputs, divergence)
    if on_gpu:
        torch.cuda.synchronize()
    taken = time.perf_counter() - begun
    del results
    return taken, (torch.cuda.max_memory_allocated() - before) / 2**20 if on_gpu else 0.0


if __name__ == "__main__":
    main()
