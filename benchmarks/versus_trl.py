"""Equal seconds: ours, TRL's GKDTrainer and plain fine-tuning teach the demo's student from the same batches.

    potstill demo                                          # once: its conversations are learned from and measured on
    python benchmarks/versus_trl.py                        # four methods, five seeds of 240 seconds: 1 h 45 min on two cores
    python benchmarks/versus_trl.py --times 5,10 --seeds 0 --held-out 8 --output runs/versus_trl_trial
    python benchmarks/versus_trl.py --table                # what has been measured so far, and the plot

SmolLM2-135M-Instruct in bfloat16 teaches half its layers: float32 weights under bfloat16 autocast, embeddings frozen, four
conversations a step, AdamW at one constant learning rate after a few steps of warm-up. All of that is the same for every method,
and so is the order of the conversations, which is drawn from the seed before any trainer sees them. TRL's trainers get them
tokenized, padded by our collator: the same tokens are learned, and no step waits for a tokenizer. Activation checkpointing, TRL's
default, is off. GKDTrainer learns off-policy (lmbda 0) by forward KL (beta 0), temperature 1.

Every run has a process of its own. Its clock starts after two steps and stops while the student is evaluated, at the first
step that ends beyond each of the times; what is evaluated is a copy of the weights in bfloat16, as `potstill distill` does.
Results are lines of OUTPUT/results.jsonl, written when a run is finished; the same command makes what is missing. Stopping
the process group (SIGSTOP, SIGCONT) is harmless: seconds in which the process stood still do not count. Other work on the same
cores is not: the share of the cores that a run had is printed beside its speed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import transformers

METHODS = {
    "ours": "potstill logits",
    "trl": "TRL GKDTrainer",
    "text": "potstill text",
    "sft": "TRL SFTTrainer",
}
RIVAL = "trl"
BATCH = 4
WARM_UP = 2
PASSES = 50  # of the data, each in an order of its own: more than anybody gets through
MAX_LENGTH = 1024
RESAMPLES = 4000
Rows = list[dict[str, Any]]


class Clock:
    """Seconds, of the wall and of the processor, while it runs.

    A thread looks at it ten times a second. A look that is seconds late means that the whole process stood still (SIGSTOP, a laptop
    asleep), and that time is kept apart.
    """

    LATE = 2.0

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = self.stood_still_seconds = 0.0
        self.running, self.lock = False, threading.Lock()
        self.last = time.perf_counter(), time.process_time()
        threading.Thread(target=self._watch, daemon=True).start()

    def start(self) -> None:
        self.look()
        self.running = True

    def stop(self) -> None:
        self.look()
        self.running = False

    def look(self) -> float:
        """Seconds so far."""
        with self.lock:
            now = time.perf_counter(), time.process_time()
            passed, worked = (after - before for before, after in zip(self.last, now, strict=True))
            self.last = now
            if self.running:
                self.cpu_seconds += worked
                if passed > self.LATE:
                    self.stood_still_seconds += passed
                else:
                    self.seconds += passed
            return self.seconds

    def _watch(self) -> None:
        while True:
            time.sleep(0.1)
            self.look()


class Measure(transformers.TrainerCallback):
    """Calls ``record`` at the first step that ends beyond each of the times; the last one ends the training."""

    def __init__(self, times: list[float], record: Any) -> None:
        self.due, self.record, self.clock = sorted(times), record, Clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARM_UP:
            self.clock.start()
            return
        while self.due and self.clock.look() >= self.due[0]:
            self.clock.stop()
            self.record(self.due.pop(0), state.global_step, self.clock)
            self.clock.start()
        control.should_training_stop = not self.due


class Judge:
    """Our evaluation, on models of its own: whatever a trainer has wrapped around its models, it does not touch these."""

    def __init__(self, options: Any) -> None:
        self.options, self.held_out = options, None

    def __call__(self, student: Any = None) -> dict[str, Any]:
        """KL nats and tokens of each held-out conversation; without a ``student``, of the untrained one."""
        import torch

        from potstill import load_model
        from potstill.evaluation import HeldOut, conversation_sums

        if self.held_out is None:
            self.teacher, teacher_tokenizer = load_model("demo", dtype="bfloat16")
            self.copy, tokenizer = load_model(self.options.output / "student", dtype="bfloat16")
            self.held_out = HeldOut(
                teacher_tokenizer,
                tokenizer,
                conversations(self.options, "held_out"),
                max_length=MAX_LENGTH,
            )
        if student is not None:
            with torch.no_grad():
                for name, weight in self.copy.named_parameters():
                    weight.copy_(student.get_parameter(name))
        sums = conversation_sums(self.held_out.score_student(self.copy, self.teacher))
        return {"kl_nats": sums["kl_nats"], "tokens": sums["tokens"]}


def conversations(options: Any, split: str) -> list[Any]:
    from potstill.data import read_conversations

    found = list(read_conversations(options.data_from / "data" / split / "conversations.jsonl"))
    return found[: options.held_out] if split == "held_out" else found


def run(options: Any, method: str, seed: int) -> Rows:
    """One student trained: what was measured at each of the times."""
    import torch

    from potstill import load_model
    from potstill.data import tokenize_conversations

    torch.set_num_threads(options.threads)
    facts = {"method": method, "seed": seed, "made_with": made_with(options)}
    judge, rows = Judge(options), []
    if method == "before":
        return [{**facts, "time": 0, **judge()}]
    student, tokenizer = load_model(options.output / "student", dtype="float32")
    for module in (student.get_input_embeddings(), student.get_output_embeddings()):
        module.requires_grad_(False)
    dataset, _ = tokenize_conversations(
        conversations(options, "train"), tokenizer, max_length=MAX_LENGTH
    )
    draw = np.random.default_rng(seed)
    order = np.concatenate([draw.permutation(len(dataset)) for _ in range(PASSES)])
    sizes = np.array([len(row["input_ids"]) for row in dataset])[order]
    supervised = np.array([sum(label != -100 for label in row["labels"]) for row in dataset])[order]

    def record(due: float, step: int, clock: Clock) -> None:
        seen = slice(WARM_UP * BATCH, step * BATCH)
        rows.append(
            {
                **facts,
                "time": due,
                "step": step,
                "seconds": round(clock.seconds, 3),
                "cpu_seconds": round(clock.cpu_seconds, 3),
                "stood_still_seconds": round(clock.stood_still_seconds, 3),
                "trained_tokens": int(sizes[seen].sum()),
                "trained_supervised_tokens": int(supervised[seen].sum()),
                "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                **judge(student),
            }
        )
        print(
            f"  {due:g} s, step {step}: {kl(rows[-1]):.4f} nats a token",
            file=sys.stderr,
            flush=True,
        )

    trainer = make_trainer(
        method, student, tokenizer, dataset.select(order), settings(options, seed)
    )
    trainer.add_callback(Measure(options.times, record))
    trainer.train()
    return rows


def settings(options: Any, seed: int) -> dict[str, Any]:
    """What every trainer is given alike; the demo's, with a learning rate that does not depend on how far a run will come."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": 10**6,
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "bf16": True,
        "use_cpu": True,
        "activation_checkpointing": False,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "seed": seed,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def make_trainer(
    method: str, student: Any, tokenizer: Any, dataset: Any, alike: dict[str, Any]
) -> Any:
    from potstill import DistillationConfig, DistillationTrainer, load_model
    from potstill.data import BatchLayout

    if method == "text":
        return DistillationTrainer(
            student,
            None,
            DistillationConfig(method="text", **alike),
            dataset,
            processing_class=tokenizer,
        )
    tokenized = {
        "train_dataset": dataset,
        "data_collator": BatchLayout(tokenizer.pad_token_id, packed=False),
        "processing_class": tokenizer,
    }
    if method == "sft":
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(
            student, SFTConfig(**alike, dataset_kwargs={"skip_prepare_dataset": True}), **tokenized
        )
    teacher, teacher_tokenizer = load_model("demo", dtype="bfloat16")
    if method == "trl":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        return GKDTrainer(
            student, teacher, GKDConfig(**alike, lmbda=0.0, beta=0.0, temperature=1.0), **tokenized
        )
    pair = {"processing_class": tokenizer, "teacher_tokenizer": teacher_tokenizer}
    return DistillationTrainer(
        student, teacher, DistillationConfig(method="logits", **alike), dataset, **pair
    )


def measure_all(options: Any) -> None:
    """Every run that is not yet in the file, a seed at a time; who begins changes with the seed."""
    results = options.output / "results.jsonl"
    done = {(row["method"], row["seed"], row["time"]) for row in read(results)}
    runs = [("before", 0)]
    for seed in options.seeds:
        first = seed % len(options.methods)
        runs += [(method, seed) for method in options.methods[first:] + options.methods[:first]]
    for method, seed in runs:
        times = [0] if method == "before" else options.times
        if done.issuperset((method, seed, at) for at in times):
            continue
        print(f"{method}, seed {seed}", flush=True)
        flags = ["--only", method, "--seeds", str(seed)]
        command, quiet = (
            [sys.executable, __file__, *sys.argv[1:], *flags],
            {**os.environ, "TQDM_DISABLE": "1"},
        )
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=quiet, check=False)
        if child.returncode:
            sys.exit(
                f"{method}, seed {seed}: failed as written above; finished runs are kept, the same command goes on"
            )
        rows = json.loads(child.stdout.splitlines()[-1])
        with results.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def read(results: Path) -> Rows:
    return (
        [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
        if results.is_file()
        else []
    )


def kl(row: dict[str, Any]) -> float:
    return float(sum(row["kl_nats"]) / sum(row["tokens"]))


def by_seed(rows: Rows, method: str, at: float) -> dict[int, dict[str, Any]]:
    return {row["seed"]: row for row in rows if (row["method"], row["time"]) == (method, at)}


def difference(ours: dict[int, Any], theirs: dict[int, Any]) -> str:
    """Nats a token below or above theirs, with a 95 % interval: seeds and conversations are both drawn again, in pairs."""
    seeds = sorted(ours.keys() & theirs.keys())
    tokens = np.array(ours[seeds[0]]["tokens"])
    nats = np.array([np.subtract(ours[seed]["kl_nats"], theirs[seed]["kl_nats"]) for seed in seeds])
    generator = np.random.default_rng(0)
    seed_draws, conversation_draws = (
        generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
        for count in nats.shape
    )
    drawn = np.einsum("rs,sc,rc->r", seed_draws / len(seeds), nats, conversation_draws) / (
        conversation_draws @ tokens
    )
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"{nats.mean(0).sum() / tokens.sum():+.3f} [{low:+.3f}, {high:+.3f}]"


def print_table(rows: Rows, times: list[float]) -> None:
    before = next((kl(row) for row in rows if row["method"] == "before"), math.nan)
    print(
        "",
        *sorted({row["made_with"] for row in rows}),
        f"held-out KL before training: {before:.3f} nats a token\n",
        sep="\n",
    )
    heads = [f"KL at {at:g} s, to TRL" for at in times]
    print(
        "| "
        + " | ".join(
            ["", "seeds", *heads, "steps", "tokens/s", "of them learned", "cores had", "peak MB"]
        )
        + " |"
    )
    print("|---" * (7 + len(times)) + "|")
    for method, name in METHODS.items():
        last = list(by_seed(rows, method, times[-1]).values())
        if not last:
            continue
        cells = []
        for at in times:
            own, theirs = by_seed(rows, method, at), by_seed(rows, RIVAL, at)
            mean = np.mean([kl(row) for row in own.values()])
            paired = method != RIVAL and own.keys() & theirs.keys()
            cells.append(f"{mean:.3f}" + (f", {difference(own, theirs)}" if paired else ""))
        seconds = sum(row["seconds"] for row in last)
        speeds = [
            sum(row[f"trained_{kind}"] for row in last) / seconds
            for kind in ("tokens", "supervised_tokens")
        ]
        share = sum(row["cpu_seconds"] for row in last) / seconds
        peak = max(
            row["peak_memory_mb"] for row in by_seed(rows, method, times[0]).values()
        )  # evaluation comes after it
        more = [
            f"{np.mean([row['step'] for row in last]):.0f}",
            *(f"{speed:.0f}" for speed in speeds),
            f"{share:.2f}",
            f"{peak}",
        ]
        print("| " + " | ".join([name, str(len(last)), *cells, *more]) + " |")
    stood_still = sum(row["stood_still_seconds"] for row in rows if row["time"] == times[-1])
    print(
        f"\nIntervals 95 %, paired, over seeds and conversations; {stood_still:.0f} s of standing still not counted."
    )


def draw_plot(rows: Rows, times: list[float], file: Path) -> None:
    """Held-out KL over seconds: the mean over seeds, and a band from the best seed to the worst."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.4))
    for method, colour in zip(METHODS, ("#d94801", "#2171b5", "#fdae6b", "#9ecae1"), strict=True):
        at = [time for time in times if by_seed(rows, method, time)]
        seeds = [[kl(row) for row in by_seed(rows, method, time).values()] for time in at]
        if at:
            axes.plot(
                at,
                [np.mean(one) for one in seeds],
                color=colour,
                marker="o",
                markersize=3,
                label=METHODS[method],
            )
            axes.fill_between(
                at,
                [min(one) for one in seeds],
                [max(one) for one in seeds],
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
    axes.set(xscale="log", xlabel="seconds of training", ylabel="held-out KL, nats a token")
    axes.set_xticks(times, [f"{time:g}" for time in times])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    plt.rcParams["svg.hashsalt"] = "potstill"
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    print(f"plot: {file}")


def made_with(options: Any) -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = (
        re.search(r"model name\s*: (.+)", cpuinfo.read_text(encoding="utf-8"))
        if cpuinfo.is_file()
        else None
    )
    cores = f"{found[1] if found else platform.processor()}, {options.threads} threads on {os.cpu_count()} cores"
    installed = [
        name for name in ("torch", "transformers", "trl") if importlib.util.find_spec(name)
    ]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in installed)
    return f"{cores}; {versions}; learning rate {options.learning_rate:g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-from", type=Path, default=Path("runs/demo"), help="the demo's run folder"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/versus_trl"))
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument(
        "--seeds",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[0, 1, 2, 3, 4],
    )
    parser.add_argument(
        "--times",
        type=lambda text: sorted(map(float, text.split(","))),
        default=[30.0, 60.0, 120.0, 240.0],
    )
    parser.add_argument("--held-out", type=int, help="measure on so many conversations; all")
    parser.add_argument(
        "--learning-rate", type=float, default=2e-4, help="6e-4 stands still after a minute"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--table", action="store_true", help="print what has been measured, and measure nothing"
    )
    parser.add_argument("--plot", type=Path, help="an SVG file; OUTPUT/versus_trl.svg")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(run(options, options.only, options.seeds[0])))
        return
    if not options.table:
        refuse(parser, options)
        from potstill.commands.demo import LAYERS
        from potstill.students import make_student

        if not (options.output / "student").is_dir():
            make_student("demo", str(options.output / "student"), keep=LAYERS)
        measure_all(options)
    rows = read(options.output / "results.jsonl")
    if not rows:
        parser.error(f"{options.output}: nothing has been measured there")
    print_table(rows, options.times)
    draw_plot(rows, options.times, options.plot or options.output / "versus_trl.svg")


def refuse(parser: argparse.ArgumentParser, options: Any) -> None:
    """Say what is missing before anything is measured."""
    unknown = set(options.methods) - METHODS.keys()
    if unknown:
        parser.error(
            f"unknown methods {', '.join(sorted(unknown))}; known are {', '.join(METHODS)}"
        )
    if {"trl", "sft"} & set(options.methods) and not importlib.util.find_spec("trl"):
        parser.error(
            "TRL is not installed: pip install --no-deps trl==1.16.0, or leave it out with --methods ours,text"
        )
    if not (options.data_from / "data" / "held_out" / "conversations.jsonl").is_file():
        parser.error(
            f"{options.data_from}: no data there; run `potstill demo` first, or name its folder with --data-from"
        )


if __name__ == "__main__":
    main()
