"""Measure a training step of potstill, TRL's GKDTrainer and fine-tuning on the same batches.

    python benchmarks/step.py --data runs/demo/data/train/conversations.jsonl

The teacher is SmolLM2-135M-Instruct in bfloat16. The student is half of its layers in float32 under
bfloat16 autocast. A step uses eight conversations, in the file's order. Each method runs in its own
process, in turn, for several rounds. The first two steps are not counted. Tokens include prompts,
but not padding. KD efficiency is the time of a distillation step ÷ (the teacher's forward pass with
its LM head at the supervised positions + a fine-tuning step with a fused cross-entropy): 1 means
that distillation adds no other cost. ``cross`` treats the two models as if their tokenizers were
different, which shows the cost of the alignment.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH = 8
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="runs/demo/data/train/conversations.jsonl")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(METHODS[options.only](options)))
        return
    if not Path(options.data).is_file():
        sys.exit(f"{options.data}: not there; run `potstill demo` first, or give --data")
    names = [
        name for name in METHODS if not name.startswith("TRL") or importlib.util.find_spec("trl")
    ]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _, name in itertools.product(range(options.rounds), names):
        flags = ["--data", options.data, "--steps", str(options.steps), "--only", name]
        output = subprocess.run(
            [sys.executable, __file__, *flags], capture_output=True, text=True, check=True
        ).stdout
        results[name].append(json.loads(output.splitlines()[-1]))
    print_table(results)


def print_table(results: dict[str, list[dict[str, float]]]) -> None:
    seconds = {
        name: statistics.median(row["seconds"] for row in rows) for name, rows in results.items()
    }
    reference = seconds["potstill logits"]
    header = "| method | tokens/s | seconds per step | time ÷ time of `potstill logits` |"
    print(f"{header}\n|---|---|---|---|")
    for name, rows in results.items():
        print(
            f"| {name} | {rows[0]['tokens'] / seconds[name]:.0f} | {seconds[name]:.2f} "
            f"| {seconds[name] / reference:.2f} |"
        )
    efficiency = reference / (seconds["teacher forward alone"] + seconds["potstill text"])
    print(
        f"\nKD efficiency {efficiency:.2f} "
        "(potstill logits ÷ (teacher forward alone + potstill text))"
    )


def conversations(options: Any) -> list[dict[str, Any]]:
    from potstill.data import read_conversations

    rows = list(
        itertools.islice(read_conversations(options.data), BATCH * (options.steps + WARM_UP))
    )
    return [{"messages": row["messages"]} for row in rows]


def pair() -> tuple[Any, Any, Any]:
    from potstill import keep_layers, load_model

    teacher, tokenizer = load_model("demo", dtype="bfloat16")
    return teacher, keep_layers(teacher, 15).float(), tokenizer


def timed(options: Any, trainer: Any, tokens: int) -> dict[str, float]:
    """Return seconds per step, over the steps after the warm-up."""
    import transformers

    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    steps = len(times) - WARM_UP
    return {
        "seconds": (times[-1] - times[WARM_UP - 1]) / steps,
        "tokens": tokens / (steps + WARM_UP),
    }


def arguments(options: Any) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": options.steps + WARM_UP,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-4,
        "bf16": True,
        "use_cpu": True,
        "activation_checkpointing": False,  # it is on by default in TRL
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1000,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }


def potstill_step(options: Any, method: str, **more: Any) -> dict[str, float]:
    from potstill import DistillationConfig, DistillationTrainer
    from potstill.data import tokenize_conversations
    from potstill.training.kept_memory import keep_freed_memory

    keep_freed_memory()  # as `potstill distill` does
    teacher, student, tokenizer = pair()
    rows = conversations(options)
    _, counts = tokenize_conversations(rows, tokenizer)
    settings = DistillationConfig(method=method, **arguments(options), **more)
    trainer = DistillationTrainer(
        student, teacher, settings, rows, processing_class=tokenizer, teacher_tokenizer=tokenizer
    )
    return timed(options, trainer, counts.tokens)


def captured_step(options: Any) -> dict[str, float]:
    """Train from captured hidden states; the capture itself is not timed."""
    from potstill.data import tokenize_conversations
    from potstill.models import ModelOpener
    from potstill.teachers import capture_conversations

    folder, rows = tempfile.mkdtemp(), conversations(options)
    opener = ModelOpener(dtype="bfloat16")
    capture_conversations("demo", rows, folder, max_length=1024, opener=opener, progress=False)
    return elsewhere(options, folder, tokenize_conversations(rows, opener.tokenizer("demo"))[1])


def served_step(options: Any) -> dict[str, float]:
    """Train with a server in another process, on the same cores."""
    from potstill.data import tokenize_conversations
    from potstill.models import load_tokenizer

    command = [sys.executable, "-m", "potstill", "serve", "demo", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        url = server.stdout.readline().split()[2]
        counts = tokenize_conversations(conversations(options), load_tokenizer("demo"))[1]
        return elsewhere(options, url, counts)
    finally:
        server.kill()


def elsewhere(options: Any, source: str, counts: Any) -> dict[str, float]:
    """Train with a teacher that is not in this process."""
    from potstill import DistillationConfig, DistillationTrainer
    from potstill.teachers import open_teacher
    from potstill.training.kept_memory import keep_freed_memory

    keep_freed_memory()
    _, student, tokenizer = pair()
    trainer = DistillationTrainer(
        student,
        open_teacher(source),
        DistillationConfig(method="logits", **arguments(options)),
        conversations(options),
        processing_class=tokenizer,
    )
    return timed(options, trainer, counts.tokens)


def plain_step(options: Any) -> dict[str, float]:
    """Run transformers' Trainer unchanged: padded, dense logits, cross-entropy on answers."""
    import transformers

    from potstill.data import BatchLayout, tokenize_conversations

    _, student, tokenizer = pair()
    dataset, counts = tokenize_conversations(conversations(options), tokenizer)
    trainer = transformers.Trainer(
        student,
        transformers.TrainingArguments(**arguments(options), remove_unused_columns=False),
        train_dataset=dataset,
        data_collator=BatchLayout(tokenizer.pad_token_id, packed=False),
    )
    return timed(options, trainer, counts.tokens)


def trl_step(options: Any) -> dict[str, float]:
    import datasets
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from potstill.data import tokenize_conversations

    teacher, student, tokenizer = pair()
    rows = conversations(options)
    _, counts = tokenize_conversations(rows, tokenizer)
    settings = GKDConfig(**arguments(options), lmbda=0.0, beta=0.0, temperature=1.0, max_length=512)
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return timed(options, trainer, counts.tokens)


def trl_step_with_memory_kept(options: Any) -> dict[str, float]:
    """Run TRL's step with the allocator setting of potstill's commands."""
    from potstill.training.kept_memory import keep_freed_memory

    keep_freed_memory()
    return trl_step(options)


def teacher_forward(options: Any) -> dict[str, float]:
    import torch

    from potstill.data import BatchLayout, tokenize_conversations
    from potstill.models.heads import hidden_states, model_inputs, supervised

    teacher, _, tokenizer = pair()
    dataset, counts = tokenize_conversations(conversations(options), tokenizer)
    layout = BatchLayout(tokenizer.pad_token_id)
    times = []
    for start in range(0, len(dataset), BATCH):
        batch = layout([dataset[i] for i in range(start, start + BATCH)])
        begun = time.perf_counter()
        with torch.no_grad():
            hidden = hidden_states(teacher, model_inputs(batch))
            supervised(hidden, batch["labels"])[0] @ teacher.get_output_embeddings().weight.T
        times.append(time.perf_counter() - begun)
    return {"seconds": statistics.mean(times[WARM_UP:]), "tokens": counts.tokens / len(times)}


METHODS = {
    "potstill logits": lambda options: potstill_step(options, "logits"),
    "potstill logits, padded": lambda options: potstill_step(options, "logits", packed=False),
    "potstill logits, captured": captured_step,
    "potstill logits, served": served_step,
    "potstill cross": lambda options: potstill_step(options, "cross"),
    "TRL 1.16 GKDTrainer": trl_step,
    "TRL 1.16 GKDTrainer, freed memory kept": trl_step_with_memory_kept,
    "potstill text": lambda options: potstill_step(options, "text"),
    "Trainer, fine-tuning": plain_step,
    "teacher forward alone": teacher_forward,
}

if __name__ == "__main__":
    main()
