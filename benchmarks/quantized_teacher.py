"""Measure what a quantized teacher costs: nats at the teacher, and at the student that it trains.

    python benchmarks/quantized_teacher.py [--data DIR] [--steps 60] [--seeds 0,1,2]

Teachers are the demo's in full precision (bfloat16), in 8 and in 4 bits as `--quantize-teacher`
opens them, and, as the other well-known 8 bits, LLM.int8 of bitsandbytes, which is not offered: the
last column of the first table shows why. That table is KL(full ‖ quantized) on the held-out
answers, and the largest change of a logit when the same conversation is read in another batch.

The second table trains the demo's student on a capture of each teacher, for equal steps, on the
same data in the same order. Held-out KL is always measured from the teacher in full precision;
differences from the student of that teacher are paired by conversation and seed (95 %).

--data needs the demo's answers (run `potstill demo` first).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch

KINDS = {"full": None, "8bit": "8bit", "4bit": "4bit"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, default=Path("runs/quantized-teacher"))
    options = parser.parse_args()
    files = [options.data / split / "conversations.jsonl" for split in ("train", "held_out")]
    if not files[0].is_file():
        sys.exit(f"{options.data}: no data there; run `potstill demo` first, or give --data")
    measure_teachers(files[1])
    train(options, files)


def measure_teachers(held_out: Path) -> None:
    from potstill.data import read_conversations, tokenize_conversations
    from potstill.models import ModelOpener
    from potstill.teachers import LocalTeacher
    from potstill.teachers.quantization_cost import ExactStates

    opener = ModelOpener(dtype="bfloat16", device="cpu")
    rows, _ = tokenize_conversations(list(read_conversations(held_out)), opener.tokenizer("demo"))
    exact = ExactStates.collect("demo", opener, rows)
    assert exact is not None
    print("| teacher | nats from full precision | same top token | a logit changes by |")
    print("|---|---|---|---|", flush=True)
    models = {
        "full": lambda: opener.model("demo"),
        "8bit": lambda: ModelOpener(dtype="bfloat16", device="cpu", quantize="8bit").model("demo"),
        "4bit": lambda: ModelOpener(dtype="bfloat16", device="cpu", quantize="4bit").model("demo"),
        "LLM.int8": llm_int8,
    }
    for name, open_model in models.items():
        model: Any = open_model()
        cost = exact.compare(LocalTeacher(model)).as_dict()
        low, high = cost["ci95"]
        print(
            f"| {name} | {cost['kl_nats_per_token']:.4f} [{low:.4f}, {high:.4f}] "
            f"| {cost['top1_agreement']:.1%} | {change_in_another_batch(model, rows):.2g} |",
            flush=True,
        )
    print(f"\n{cost['tokens']} tokens of {cost['conversations']} held-out answers\n", flush=True)


def llm_int8() -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from potstill.models import locate

    chosen = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(
        locate("demo"), dtype=torch.bfloat16, quantization_config=chosen, device_map={"": "cpu"}
    ).eval()


@torch.no_grad()
def change_in_another_batch(model: Any, rows: Any) -> float:
    """Return the largest change of a logit between a conversation alone and as one of four."""
    ids = [torch.tensor(rows[i]["input_ids"]) for i in range(4)]
    length = min(map(len, ids))
    together = torch.stack([one[:length] for one in ids])
    alone, among = (model(input_ids=one).logits[0].float() for one in (together[:1], together))
    return float((alone - among).abs().max())


def train(options: Any, files: list[Path]) -> None:
    from potstill import evaluate
    from potstill.commands.demo import LAYERS
    from potstill.data import read_conversations
    from potstill.defaults import MAX_LENGTH
    from potstill.distillation.settings import DistillSettings
    from potstill.distillation.training import train as run_training
    from potstill.evaluation.paired import Ratios, paired_difference
    from potstill.models import ModelOpener
    from potstill.run_folder import RunFolder
    from potstill.students import make_student
    from potstill.teachers import capture_conversations

    student = options.output / "student"
    if not student.is_dir():
        make_student("demo", str(student), keep=LAYERS)
    seconds = {}
    for (name, quantize), file in itertools.product(KINDS.items(), files):
        begun = time.perf_counter()
        capture_conversations(
            "demo",
            read_conversations(file),
            options.output / name,
            max_length=MAX_LENGTH,
            opener=ModelOpener(dtype="bfloat16", quantize=quantize),
            progress=False,
        )
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begun
    seeds = [int(seed) for seed in options.seeds.split(",")]
    sums: dict[str, list[Any]] = {name: [] for name in KINDS}
    for seed, name in itertools.product(seeds, KINDS):
        run = RunFolder(options.output / f"{name}-{seed}")
        settings = DistillSettings(
            teacher=str(options.output / name),
            student=str(student),
            data=str(files[0]),
            eval_data=str(files[1]),
            output_dir=str(run.path),
            max_steps=options.steps,
            batch_size=4,
            learning_rate=6e-4,
            freeze_embeddings=True,
            seed=seed,
        )
        run_training(run, settings)
        measured = evaluate(run.student, options.output / "full", files[1])
        sums[name].append(measured.sums)
        print(f"{name}, seed {seed}: {measured['kl_nats_per_token']:.4f}", flush=True)
    print(
        f"\n| teacher | held-out KL after {options.steps} steps | minus full | capture, seconds |"
    )
    print("|---|---|---|---|")
    ratios = {
        name: Ratios(
            *(torch.tensor([one[part] for one in runs]).numpy() for part in ("kl_nats", "tokens"))
        )
        for name, runs in sums.items()
    }
    for name, ratio in ratios.items():
        found = paired_difference(ratio, ratios["full"])
        interval = f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
        print(f"| {name} | {ratio.value:.4f} | {interval} | {seconds[name]:.0f} |")
    print(f"\n{len(seeds)} seeds, {found.conversations} held-out conversations")


if __name__ == "__main__":
    main()
