"""Compare what can be kept of a teacher: bytes, bias, noise, and the student that comes of it.

    python benchmarks/captures.py [--tokens 1000] [--thresholds 0.02,0.03,0.05]
    python benchmarks/captures.py --train [--steps 60] [--seeds 0,1,2]

The first form takes the demo teacher's distributions at the tokens of the demo's answers (run
`potstill demo` first, or give --data). Noise is E‖t − q‖² of a target t for the distribution q, and
through the head E‖(t − q) W‖²; bias is ‖E[t] − q‖² over many draws. RSKD (arXiv 2503.16870) draws
50 tokens with replacement; the others keep as many tokens as threshold sampling does on average.
The floor of noise and bias is `states`, which keeps everything. Bytes are those of the files of a
real capture, everything included; for the other targets, what the same packing would take.

The second form trains the demo's student on each kind of target for equal steps, and prints
held-out KL with paired 95 % intervals against the live teacher.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DRAWS = 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda kind: lambda text: [kind(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--thresholds", type=numbers(float), default=[0.02, 0.025, 0.03, 0.05])
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=numbers(int), default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/captures"))
    options = parser.parse_args()
    if not (options.data / "train" / "conversations.jsonl").is_file():
        sys.exit(f"{options.data}: no data there; run `potstill demo` first, or give --data")
    train(options) if options.train else measure(options)


def measure(options: Any) -> None:
    from potstill import load_model
    from potstill.data import BatchLayout, encode_conversation, read_conversations
    from potstill.teachers import LocalTeacher

    model, tokenizer = load_model("demo", dtype="bfloat16")
    teacher = LocalTeacher(model)
    rows = read_conversations(options.data / "held_out" / "conversations.jsonl")
    states: list[Tensor] = []
    while sum(map(len, states)) < options.tokens:
        batch = BatchLayout(tokenizer.pad_token_id)([encode_conversation(next(rows), tokenizer)])
        states.append(teacher.targets(batch).hidden)
    weight = model.get_output_embeddings().weight.float()
    q = (torch.cat(states)[: options.tokens].float() @ weight.T).double().softmax(-1)
    print(f"{len(q)} tokens, V = {q.shape[1]}, mean entropy {entropy(q):.2f} nats\n")
    print(
        "| target | stored tokens per position | bias | noise | through the head | RSKD's ÷ noise |"
    )
    print("|---|---|---|---|---|---|")
    random = torch.Generator().manual_seed(0)
    reference = report("RSKD, 50 draws", q, weight, lambda: rskd(q, random), None)
    for threshold in options.thresholds:
        name = f"threshold {threshold:g}"
        draw = lambda threshold=threshold: thresholded(q, threshold, random)  # noqa: E731
        report(name, q, weight, draw, reference)
    k = 12
    report(f"top-{k} renormalized", q, weight, lambda: top_k(q, k), reference)
    bytes_on_disk(options)


def entropy(q: Tensor) -> float:
    return float(-(q * q.clamp_min(1e-30).log()).sum(-1).mean())


def report(name: str, q: Tensor, weight: Tensor, draw: Any, reference: float | None) -> float:
    """Print one row; return the noise."""
    mean, square, head, entries = torch.zeros_like(q), 0.0, 0.0, 0.0
    for _ in range(DRAWS):
        t = draw()
        mean += t / DRAWS
        square += float(((t - q) ** 2).sum(-1).mean()) / DRAWS
        head += float((((t - q).float() @ weight) ** 2).sum(-1).mean()) / DRAWS
        entries += float((t > 0).double().sum(-1).mean()) / DRAWS
    # The mean of the draws has 1/DRAWS of their variance; what is more is bias.
    noise_and_bias = float(((mean - q) ** 2).sum(-1).mean())
    bias = max(0.0, (noise_and_bias - square / DRAWS) / (1 - 1 / DRAWS))
    ratio = "" if reference is None else f"{reference / square:.2f}"
    print(
        f"| {name} | {entries:.1f} | {bias:.5f} | {square:.4f} | {head:.4f} | {ratio} |", flush=True
    )
    return square


def rskd(q: Tensor, random: torch.Generator, draws: int = 50) -> Tensor:
    ids = torch.multinomial(q, draws, replacement=True, generator=random)
    return torch.zeros_like(q).scatter_add_(-1, ids, q.new_full(ids.shape, 1 / draws))


def thresholded(q: Tensor, threshold: float, random: torch.Generator) -> Tensor:
    from potstill.losses.sparse import threshold_sample

    drawn = threshold_sample(q, threshold, torch.rand(len(q), generator=random))
    owner = torch.repeat_interleave(drawn.counts)
    return torch.zeros_like(q).index_put_((owner, drawn.ids), drawn.masses, accumulate=True)


def top_k(q: Tensor, k: int) -> Tensor:
    values, ids = q.topk(k)
    return torch.zeros_like(q).scatter_(-1, ids, values / values.sum(-1, keepdim=True))


def bytes_on_disk(options: Any) -> None:
    """Capture the held-out conversations in each way; print bytes a token and seconds."""
    from potstill.data import read_conversations
    from potstill.defaults import MAX_LENGTH
    from potstill.models import ModelOpener
    from potstill.teachers import capture_conversations

    print(
        "\n| kept | bytes a token | of states | KL of rounding | seconds |\n|---|---|---|---|---|"
    )
    first = None
    kinds = [("states", {}), ("states8", {})]
    kinds += [("sparse", {"threshold": threshold}) for threshold in options.thresholds]
    for keep, more in kinds:
        folder, begun = Path(tempfile.mkdtemp()), time.perf_counter()
        capture_conversations(
            "demo",
            read_conversations(options.data / "held_out" / "conversations.jsonl"),
            folder,
            keep=keep,
            max_length=MAX_LENGTH,
            opener=ModelOpener(dtype="bfloat16"),
            progress=False,
            **more,
        )
        seconds = time.perf_counter() - begun
        manifest = json.loads((folder / "manifest.json").read_text())
        size = manifest["bytes"] / manifest["tokens"]
        first = first or size
        nats = manifest.get("rounding_kl_nats")
        cost = "" if nats is None else f"{nats:.5f}"
        name = f"{keep} {more.get('threshold', '')}".strip()
        print(f"| {name} | {size:.1f} | {size / first:.3f} | {cost} | {seconds:.1f} |", flush=True)


def train(options: Any) -> None:
    """Train on each kind of target; print held-out KL and its paired difference from live."""
    from potstill import distill
    from potstill.commands.demo import LAYERS
    from potstill.data import read_conversations
    from potstill.defaults import MAX_LENGTH
    from potstill.evaluation.paired import Ratios, paired_difference
    from potstill.models import ModelOpener
    from potstill.students import make_student
    from potstill.teachers import capture_conversations

    student = options.output / "student"
    if not student.is_dir():
        make_student("demo", str(student), keep=LAYERS)
    files = [options.data / split / "conversations.jsonl" for split in ("train", "held_out")]
    teachers = {"live": "demo"}
    for keep in ("states", "states8", "sparse"):
        teachers[keep] = str(options.output / keep)
        for file in files:
            capture_conversations(
                "demo",
                read_conversations(file),
                teachers[keep],
                keep=keep,
                max_length=MAX_LENGTH,
                opener=ModelOpener(dtype="bfloat16"),
                progress=False,
            )
    sums: dict[str, list[Any]] = {name: [] for name in teachers}
    seconds: dict[str, float] = {}
    for seed, (name, teacher) in itertools.product(options.seeds, teachers.items()):
        begun = time.perf_counter()
        run = distill(
            teacher=teacher,
            student=student,
            data=files[0],
            eval_data=str(files[1]),
            output_dir=options.output / f"{name}-{seed}",
            max_steps=options.steps,
            batch_size=4,
            learning_rate=6e-4,
            freeze_embeddings=True,
            seed=seed,
        )
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begun
        # A sparse capture only estimates KL: measure every student against the live teacher.
        from potstill import evaluate

        sums[name].append(evaluate(run.folder / "student", "demo", files[1]).sums)
    print(f"\n| target | held-out KL after {options.steps} steps | minus live | seconds a run |")
    print("|---|---|---|---|")
    ratios = {
        name: Ratios(
            *(torch.tensor([one[part] for one in runs]).numpy() for part in ("kl_nats", "tokens"))
        )
        for name, runs in sums.items()
    }
    for name, ratio in ratios.items():
        found = paired_difference(ratio, ratios["live"])
        interval = f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
        each = seconds[name] / len(options.seeds)
        print(f"| {name} | {ratio.value:.4f} | {interval} | {each:.0f} |")


if __name__ == "__main__":
    main()
