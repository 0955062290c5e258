"""Compare potstill with TRL: the same student, batches and seconds of training.

    potstill demo                    # once: training and held-out conversations come from it
    python benchmarks/versus_trl.py  # four methods, five seeds of 240 seconds: 1 h 45 min, 2 cores
    python benchmarks/versus_trl.py --times 5,10 --seeds 0 --held-out 8 --output runs/trl_trial
    python benchmarks/versus_trl.py --table          # the results so far, and the plot

The teacher is SmolLM2-135M-Instruct in bfloat16; the student keeps half its layers. Every method
uses float32 weights under bfloat16 autocast, frozen embeddings, four conversations a step, and
AdamW at a constant learning rate after a few warm-up steps. The order of the conversations is drawn
from the seed and is the same for every method. TRL's trainers get the conversations tokenized and
padded by our collator, so that they learn the same tokens and no step waits for a tokenizer.
Activation checkpointing, TRL's default, is off. GKDTrainer learns off-policy (lmbda 0) by forward
KL (beta 0) at temperature 1.

Each run has its own process. Its clock starts after two steps and stops during evaluation, which
happens at the first step that ends after each of the times, on a copy of the weights in bfloat16
(as `potstill distill` does). Results are appended to OUTPUT/results.jsonl when a run is finished;
the same command continues. Seconds in which the process is stopped (SIGSTOP) do not count. Other
work on the same cores distorts the result; the share of the cores that a run had is printed.
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
PASSES = 50  # over the data, each in another order: more than any method completes
MAX_LENGTH = 1024
Rows = list[dict[str, Any]]


class Clock:
    """Count wall seconds and processor seconds while running.

    A thread reads the clock ten times a second. A reading that is seconds late means that the whole
    process was stopped (SIGSTOP, a sleeping laptop); that time is counted apart.
    """

    LATE = 2.0

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = self.stopped_seconds = 0.0
        self.running, self.lock = False, threading.Lock()
        self.last = time.perf_counter(), time.process_time()
        threading.Thread(target=self._watch, daemon=True).start()

    def start(self) -> None:
        self.read()
        self.running = True

    def stop(self) -> None:
        self.read()
        self.running = False

    def read(self) -> float:
        """Return the seconds so far."""
        with self.lock:
            now = time.perf_counter(), time.process_time()
            passed, worked = (after - before for before, after in zip(self.last, now, strict=True))
            self.last = now
            if self.running:
                self.cpu_seconds += worked
                if passed > self.LATE:
                    self.stopped_seconds += passed
                else:
                    self.seconds += passed
            return self.seconds

    def _watch(self) -> None:
        while True:
            time.sleep(0.1)
            self.read()


class Measure(transformers.TrainerCallback):
    """Call ``record`` at the first step after each of the times; stop training at the last."""

    def __init__(self, times: list[float], record: Any) -> None:
        self.due, self.record, self.clock = sorted(times), record, Clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARM_UP:
            self.clock.start()
            return
        while self.due and self.clock.read() >= self.due[0]:
            self.clock.stop()
            self.record(self.due.pop(0), state.global_step, self.clock)
            self.clock.start()
        control.should_training_stop = not self.due


class Evaluator:
    """Evaluate on models of its own, which no trainer has wrapped."""

    def __init__(self, options: Any) -> None:
        self.options, self.held_out = options, None

    def __call__(self, student: Any = None) -> dict[str, Any]:
        """Return KL in nats and tokens per held-out conversation; default: of the untrained."""
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
    """Train one student; return what was measured at each of the times."""
    import torch

    from potstill import load_model
    from potstill.data import tokenize_conversations

    torch.set_num_threads(options.threads)
    facts = {"method": method, "seed": seed, "made_with": made_with(options)}
    evaluator, rows = Evaluator(options), []
    if method == "before":
        return [{**facts, "time": 0, **evaluator()}]
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
                "stopped_seconds": round(clock.stopped_seconds, 3),
                "trained_tokens": int(sizes[seen].sum()),
                "trained_supervised_tokens": int(supervised[seen].sum()),
                "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                **evaluator(student),
            }
        )
        print(
            f"  {due:g} s, step {step}: {kl(rows[-1]):.4f} nats per token",
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
    """Return the settings that all trainers share."""
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
    method: str, student: Any, tokenizer: Any, dataset: Any, shared: dict[str, Any]
) -> Any:
    from potstill import DistillationConfig, DistillationTrainer, load_model
    from potstill.data import BatchLayout

    if method == "text":
        return DistillationTrainer(
            student,
            None,
            DistillationConfig(method="text", **shared),
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
            student, SFTConfig(**shared, dataset_kwargs={"skip_prepare_dataset": True}), **tokenized
        )
    teacher, teacher_tokenizer = load_model("demo", dtype="bfloat16")
    if method == "trl":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        return GKDTrainer(
            student, teacher, GKDConfig(**shared, lmbda=0.0, beta=0.0, temperature=1.0), **tokenized
        )
    pair = {"processing_class": tokenizer, "teacher_tokenizer": teacher_tokenizer}
    return DistillationTrainer(
        student, teacher, DistillationConfig(method="logits", **shared), dataset, **pair
    )


def measure_all(options: Any) -> None:
    """Run what is not yet in the file, seed by seed; the first method changes with the seed."""
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
        command = [sys.executable, __file__, *sys.argv[1:], *flags]
        quiet = {**os.environ, "TQDM_DISABLE": "1"}
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=quiet, check=False)
        if child.returncode:
            sys.exit(f"{method}, seed {seed}: failed (see above); the same command continues")
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
    """Return KL nats per token minus theirs, with the paired 95 % interval of the library."""
    from potstill.evaluation.paired import Ratios, paired_difference

    seeds = sorted(ours.keys() & theirs.keys())
    one, other = (
        Ratios(
            np.array([rows[seed]["kl_nats"] for seed in seeds]),
            np.array([rows[seed]["tokens"] for seed in seeds]),
        )
        for rows in (ours, theirs)
    )
    found = paired_difference(one, other)
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def print_table(rows: Rows, times: list[float]) -> None:
    before = next((kl(row) for row in rows if row["method"] == "before"), math.nan)
    print(
        "",
        *sorted({row["made_with"] for row in rows}),
        f"held-out KL before training: {before:.3f} nats per token\n",
        sep="\n",
    )
    heads = [f"KL at {at:g} s, minus TRL's" for at in times]
    print(
        "| "
        + " | ".join(
            [
                "",
                "seeds",
                *heads,
                "steps",
                "tokens/s",
                "supervised tokens/s",
                "cores used",
                "peak MB",
            ]
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
    stopped = sum(row["stopped_seconds"] for row in rows if row["time"] == times[-1])
    print("\nIntervals: 95 %, paired, over seeds and conversations;", end=" ")
    print(f"{stopped:.0f} s in which a process was stopped are not counted.")


def draw_plot(rows: Rows, times: list[float], file: Path) -> None:
    """Plot held-out KL over seconds: the mean over seeds, and a band from best to worst seed."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.4))
    for method, color in zip(METHODS, ("#d94801", "#2171b5", "#fdae6b", "#9ecae1"), strict=True):
        at = [time for time in times if by_seed(rows, method, time)]
        seeds = [[kl(row) for row in by_seed(rows, method, time).values()] for time in at]
        if at:
            axes.plot(
                at,
                [np.mean(one) for one in seeds],
                color=color,
                marker="o",
                markersize=3,
                label=METHODS[method],
            )
            axes.fill_between(
                at,
                [min(one) for one in seeds],
                [max(one) for one in seeds],
                color=color,
                alpha=0.2,
                linewidth=0,
            )
    axes.set(xscale="log", xlabel="seconds of training", ylabel="held-out KL, nats per token")
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
    processor = found[1] if found else platform.processor()
    cores = f"{processor}, {options.threads} threads on {os.cpu_count()} cores"
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
    parser.add_argument("--held-out", type=int, help="held-out conversations; default: all")
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=2e-4,
        help="with 6e-4 KL stops falling after a minute",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--table", action="store_true", help="print the results so far, run nothing"
    )
    parser.add_argument("--plot", type=Path, help="an SVG file; OUTPUT/versus_trl.svg")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(run(options, options.only, options.seeds[0])))
        return
    if not options.table:
        validate(parser, options)
        from potstill.commands.demo import LAYERS
        from potstill.students import make_student

        if not (options.output / "student").is_dir():
            make_student("demo", str(options.output / "student"), keep=LAYERS)
        measure_all(options)
    rows = read(options.output / "results.jsonl")
    if not rows:
        parser.error(f"{options.output}: no results there")
    print_table(rows, options.times)
    draw_plot(rows, options.times, options.plot or options.output / "versus_trl.svg")


def validate(parser: argparse.ArgumentParser, options: Any) -> None:
    """Exit with a message if something is missing."""
    unknown = set(options.methods) - METHODS.keys()
    if unknown:
        parser.error(
            f"unknown methods {', '.join(sorted(unknown))}; known are {', '.join(METHODS)}"
        )
    if {"trl", "sft"} & set(options.methods) and not importlib.util.find_spec("trl"):
        parser.error(
            "TRL is not installed: pip install --no-deps trl==1.16.0, or use --methods ours,text"
        )
    if not (options.data_from / "data" / "held_out" / "conversations.jsonl").is_file():
        need = "run `potstill demo` first, or give its folder as --data-from"
        parser.error(f"{options.data_from}: no data there; {need}")


if __name__ == "__main__":
    main()
