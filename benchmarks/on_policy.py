"""Compare on-policy with off-policy training of one warm student, at equal cost.

    potstill demo                      # once: the warm student and the data come from it
    python benchmarks/on_policy.py     # every variant, five seeds: ten hours on two cores
    python benchmarks/on_policy.py --variants "off,reverse 1 25%" --seeds 0,1
    python benchmarks/on_policy.py --table

A variant is `off` (the teacher's text alone) or DIVERGENCE SHARE HORIZON: the divergence on the
student's text, its share of the micro-batches, and the length of a rollout as a part of the
answers' 64 tokens; `reuse N` behind it changes the passes over a round (4). Off-policy batches
minimize forward KL in all of them.

Equal cost: the processor seconds of an off-policy step, of an on-policy step and of a round are
measured first, and each variant gets the number of steps that costs as much as --steps off-policy
steps. Measured are KL(student ‖ teacher) a token on the student's own answers to held-out prompts,
sampled at temperature 1, and KL(teacher ‖ student) on the teacher's answers. Intervals are paired,
over conversations and seeds. Each run is a line of OUTPUT/results.jsonl; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from potstill import DistillationConfig, DistillationTrainer, load_model
from potstill.data import read_conversations
from potstill.evaluation import HeldOut, conversation_sums
from potstill.evaluation.own_answers import measure_own_answers
from potstill.evaluation.paired import Ratios, paired_difference

ANSWER = 64
DIVERGENCES = {"forward": "forward_kl", "reverse": "reverse_kl", "jsd": "jensen_shannon"}
HORIZONS = ("10%", "25%", "100%")
VARIANTS = [
    "off",
    *(
        f"{name} {share} {part}"
        for name in DIVERGENCES
        for share in ("1", "0.5")
        for part in HORIZONS
    ),
    "reverse 1 25% reuse 1",
]
TIMED = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--variants", type=lambda text: text.split(","), default=VARIANTS)
    parser.add_argument("--seeds", type=lambda text: [*map(int, text.split(","))], default=range(5))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("runs/on_policy"))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "results.jsonl"
    if not options.table:
        if not (options.demo / "student").is_dir():
            sys.exit(f"{options.demo}: no finished demo there; run `potstill demo` first")
        bench = Bench(options)
        done = {(row["variant"], row["seed"]) for row in read(file)}
        for seed in options.seeds:
            for variant in options.variants:
                if (variant, seed) not in done:
                    row = bench.run(variant, seed)
                    with file.open("a") as opened:
                        opened.write(json.dumps(row) + "\n")
    table(read(file))


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def settings_of(variant: str) -> dict[str, Any]:
    """Return the settings of a variant.

    >>> settings_of("reverse 0.5 25%")["rollout_tokens"]
    16
    """
    if variant == "off":
        return {}
    name, share, part, *more = variant.split()
    return {
        "on_policy": float(share),
        "on_policy_divergence": DIVERGENCES[name],
        "rollout_tokens": round(ANSWER * float(part.rstrip("%")) / 100),
        "rollout_reuse": int(more[1]) if more else 4,
    }


class Bench:
    def __init__(self, options: Any) -> None:
        self.options = options
        self.teacher, self.tokenizer = load_model("demo", dtype="bfloat16")
        folder = options.demo / "data"
        files = [folder / split / "conversations.jsonl" for split in ("train", "held_out")]
        self.train, held_out = (list(read_conversations(file)) for file in files)
        self.pair = HeldOut(self.tokenizer, self.tokenizer, held_out, max_length=1024)
        self.costs: dict[str, tuple[float, float]] = {}

    def run(self, variant: str, seed: int) -> dict[str, Any]:
        steps = self.steps(variant)
        one = self.trainer(variant, seed, max_steps=steps)
        begun = time.perf_counter(), time.process_time()
        one.train()
        seconds = time.perf_counter() - begun[0], time.process_time() - begun[1]
        tokens = sum(sizes := one.sizes)  # type: ignore[attr-defined]
        model = one.model.to(torch.bfloat16).eval()
        scores = self.pair.score_student(model, self.teacher)
        rows = len(model.get_output_embeddings().weight)
        own = measure_own_answers(
            model,
            self.tokenizer,
            self.pair.dataset,
            one.objective.teacher,
            rows=rows,
            most=self.options.answers,
            tokens=ANSWER,
        )
        repeated = [
            row["rollout_repeated"] for row in one.state.log_history if "rollout_repeated" in row
        ]
        print(
            f"{variant}, seed {seed}: {steps} steps, {seconds[1]:.0f} processor seconds", flush=True
        )
        return {
            "variant": variant,
            "seed": seed,
            "steps": steps,
            "seconds": seconds[0],
            "processor_seconds": seconds[1],
            "trained_tokens": tokens,
            "micro_batches": len(sizes),
            "most_repeated": max(repeated, default=0.0),
            **conversation_sums(scores),
            **own,
        }

    def steps(self, variant: str) -> int:
        """Return the steps that cost as much as the budget's off-policy steps."""
        off, _ = self.cost({})
        settings = settings_of(variant)
        if not settings:
            return int(self.options.steps)
        on, a_round = self.cost(settings)
        share, batches = settings["on_policy"], 8 * settings["rollout_reuse"]
        mean = (1 - share) * off + share * (on + a_round / batches)
        return max(1, round(self.options.steps * off / mean))

    def cost(self, settings: dict[str, Any]) -> tuple[float, float]:
        """Return the processor seconds of a step and of a round."""
        key = json.dumps(settings.get("rollout_tokens"))
        if key not in self.costs:
            timed = {**settings, "on_policy": 1.0} if settings else {}
            one = self.trainer("", 0, max_steps=1 + TIMED, learning_rate=0.0, **timed)
            clock = Clock(one)
            one.add_callback(clock)
            one.train()
            self.costs[key] = clock.step(), clock.a_round
            print(f"a step: {clock.step():.2f}, a round: {clock.a_round:.1f} processor seconds")
        return self.costs[key]

    def trainer(self, variant: str, seed: int, **more: Any) -> DistillationTrainer:
        student, tokenizer = load_model(str(self.options.demo / "student"), dtype="float32")
        for module in (student.get_input_embeddings(), student.get_output_embeddings()):
            module.requires_grad_(False)
        config = DistillationConfig(
            tempfile.mkdtemp(prefix="on-policy-"),
            per_device_train_batch_size=4,
            bf16=True,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            adam_beta1=0.8,
            adam_beta2=0.95,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=10,
            seed=seed,
            **{"learning_rate": self.options.learning_rate}
            | (settings_of(variant) if variant else {})
            | more,
        )
        one = DistillationTrainer(
            student.train(),
            self.teacher,
            config,
            train_dataset=self.train,
            processing_class=tokenizer,
            teacher_tokenizer=self.tokenizer,
        )
        one.sizes = sizes = []  # type: ignore[attr-defined]
        original = one.compute_loss

        def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            sizes.append(int((inputs["labels"][:, 1:] != -100).sum()))
            return original(model, inputs, *args, **kwargs)

        one.compute_loss = counted  # type: ignore[method-assign]
        return one


class Clock(TrainerCallback):
    """Measure the processor seconds of steps, and of the round that the first one makes."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.times: list[float] = []
        self.a_round = 0.0
        on_policy = trainer.on_policy
        if on_policy is not None:
            opened = on_policy._open_round

            def timed(*args: Any) -> None:
                begun = time.process_time()
                opened(*args)
                self.a_round = time.process_time() - begun

            on_policy._open_round = timed  # type: ignore[method-assign]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.process_time())

    def step(self) -> float:
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def table(rows: list[dict[str, Any]]) -> None:
    """Print each variant beside `off` over the seeds that both have."""
    by = {(row["variant"], row["seed"]): row for row in rows}
    print(
        "\n| variant | seeds | steps | trained tokens | KL(student ‖ teacher), own answers "
        "| minus off | held-out KL(teacher ‖ student) | minus off | ends | repeats |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        seeds = [seed for seed in range(100) if {("off", seed), (variant, seed)} <= by.keys()]
        if not seeds:
            continue
        ours, off = ([by[name, seed] for seed in seeds] for name in (variant, "off"))
        cells = []
        for numerator, denominator in (("own_kl_nats", "own_tokens"), ("kl_nats", "tokens")):
            one, other = (
                Ratios(
                    *(np.array([row[name] for row in some]) for name in (numerator, denominator))
                )
                for some in (ours, off)
            )
            found = paired_difference(one, other)
            cells += [
                f"{one.value:.4f}",
                f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]",
            ]
        ends, repeats = (
            sum(sum(row[name]) for row in ours) / sum(sum(row[of]) for row in ours)
            for name, of in (("own_ended", "own_answers"), ("own_repeated", "own_grams"))
        )
        steps, tokens = (
            sum(row[name] for row in ours) / len(ours) for name in ("steps", "trained_tokens")
        )
        print(
            f"| {variant} | {len(seeds)} | {steps:.0f} | {tokens:.0f} | {cells[0]} | {cells[1]} "
            f"| {cells[2]} | {cells[3]} | {ends:.0%} | {repeats:.1%} |"
        )


if __name__ == "__main__":
    main()
