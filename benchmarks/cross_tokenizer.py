"""Compare the methods that train a student with another tokenizer.

    make tokenizers                        # Llama-2's, the default of --tokenizer
    python benchmarks/cross_tokenizer.py   # all methods, three seeds: two hours on two cores
    python benchmarks/cross_tokenizer.py --layers 15 --seeds 0 --methods text,cells --steps 25,50
    python benchmarks/cross_tokenizer.py --tokenizer phrases --output runs/phrases
    python benchmarks/cross_tokenizer.py --table   # the results so far

The teacher is SmolLM2-135M-Instruct, the student the same model with a SentencePiece vocabulary of
32 000 tokens (or, with ``phrases``, a vocabulary that has " of the" as one token). The teacher
answers prompts at temperature 1; every method trains the same student on the same answers in the
same order, at a constant learning rate. The measure is bits per byte on held-out answers of the
teacher, minus the teacher's own: its expectation is KL per byte from teacher to student, for any
tokens. Intervals are paired, over conversations and seeds.

Each measurement is a line of OUTPUT/results.jsonl. The same command repeats interrupted runs from
their first step and skips finished ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast, TrainerCallback

from potstill import DistillationConfig, DistillationTrainer, keep_layers, load_model
from potstill.data import (
    PLAIN_CHAT_TEMPLATE,
    read_conversations,
    read_prompts,
    tokenize_conversations,
)
from potstill.evaluation import conversation_sums, score_tokens
from potstill.evaluation.paired import Ratios, paired_difference
from potstill.generation import answer_prompts
from potstill.models import load_tokenizer
from potstill.students import change_tokenizer, choose_layers

METHODS: dict[str, dict[str, Any]] = {
    "text": {"method": "text"},
    "pieces": {"method": "cross", "alignment": "pieces"},
    "pieces_alone": {"method": "cross", "alignment": "pieces", "within_weight": 0.0},
    "cells": {"method": "cross", "alignment": "cells"},
    "cells_without_within": {"method": "cross", "alignment": "cells", "within_weight": 0.0},
    **{
        name: {"method": "cross", "alignment": name}
        for name in ("push_forward", "bpm", "alm", "uld", "strict_topk")
    },
    "last_token_padded": {"method": "cross", "alignment": "last_token_padded"},
}
ANSWER_TOKENS = 80


def sampled(output: Path, answers: int, held_out: int) -> tuple[list[Any], list[Any]]:
    """Return the teacher's answers, sampled once from its whole distribution (no top-k, top-p)."""
    splits = {"train": answers, "held_out": held_out}
    with resources.as_file(resources.files("potstill.data") / "demo_prompts.jsonl") as path:
        prompts = list(read_prompts(path))
    for seed, (split, count) in enumerate(splits.items()):
        file = output / f"{split}.jsonl"
        if not file.is_file():
            print(f"the teacher answers {count} prompts into {file}", flush=True)
            teacher, tokenizer = load_model("demo", dtype="bfloat16")
            teacher.generation_config.top_k = 0
            asked = [prompt["messages"] for prompt in prompts if prompt["split"] == split][:count]
            rows = answer_prompts(
                teacher,
                tokenizer,
                asked,
                temperature=1.0,
                top_p=1.0,
                max_new_tokens=ANSWER_TOKENS,
                seed=seed,
            )
            output.mkdir(parents=True, exist_ok=True)
            file.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                encoding="utf-8",
            )
    train, test = (
        list(read_conversations(output / f"{split}.jsonl"))[:count]
        for split, count in splits.items()
    )
    return train, test


def phrases(texts: list[str], size: int = 3000) -> Any:
    """Return a byte-level tokenizer whose tokens cross words, up to the next punctuation."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    parts = pre_tokenizers.Split(Regex(r"[^\n.,:;!?]+|[\n.,:;!?]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def sums(model: Any, dataset: Any, pad: int) -> tuple[list[float], list[float]]:
    """Return NLL in nats and bytes per conversation."""
    scored = conversation_sums(score_tokens(model.eval(), dataset, pad_token_id=pad))
    return scored["nll_nats"], scored["bytes"]


class Measure(TrainerCallback):
    """Write a line at each of the chosen steps; ``seconds`` are those of training alone."""

    def __init__(self, record: Any, steps: list[int]) -> None:
        self.record, self.steps, self.paused = record, steps, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step in self.steps:
            stopped = time.perf_counter()
            self.record(model, state.global_step, stopped - self.begun - self.paused)
            model.train()
            self.paused += time.perf_counter() - stopped


def run(options: argparse.Namespace) -> None:
    results = options.output / "results.jsonl"
    train, test = sampled(options.output, options.answers, options.held_out)
    teacher, teacher_tokenizer = load_model("demo", dtype="bfloat16")
    if options.tokenizer.is_dir():
        tokenizer = load_tokenizer(str(options.tokenizer))
    else:
        tokenizer = phrases([message["content"] for row in train for message in row["messages"]])
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, PLAIN_CHAT_TEMPLATE
    cut = keep_layers(teacher, choose_layers(options.layers, of=teacher.config.num_hidden_layers))
    before = change_tokenizer(cut, teacher_tokenizer, tokenizer).float()
    held_out, _ = tokenize_conversations(test, tokenizer)

    def write(step: int, measured: tuple[list[float], list[float]], **more: Any) -> None:
        row = {
            "layers": options.layers,
            **more,
            "step": step,
            "nats": measured[0],
            "bytes": measured[1],
        }
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{more}, step {step}: {bits_per_byte(row):.4f} bits per byte", flush=True)

    done = {(row["method"], row["seed"], row["step"], row["layers"]) for row in read(results)}
    if ("teacher", 0, 0, options.layers) not in done:
        for name, model, tokens in (
            ("teacher", teacher, teacher_tokenizer),
            ("before", before, tokenizer),
        ):
            dataset, _ = tokenize_conversations(test, tokens)
            write(0, sums(model, dataset, tokens.pad_token_id), method=name, seed=0)
    for seed in options.seeds:
        for method in options.methods:
            if all((method, seed, step, options.layers) in done for step in options.steps):
                continue
            arguments = DistillationConfig(
                str(options.output / "trainer"),
                **METHODS[method],
                max_steps=max(options.steps),
                per_device_train_batch_size=options.batch_size,
                learning_rate=options.learning_rate,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=5,
                bf16=True,
                seed=seed,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                logging_strategy="no",
            )
            student = copy.deepcopy(before)
            pair = {"processing_class": tokenizer, "teacher_tokenizer": teacher_tokenizer}
            trainer = DistillationTrainer(student, teacher, arguments, train, **pair)

            def record(
                model: Any, step: int, seconds: float, method: str = method, seed: int = seed
            ) -> None:
                if (method, seed, step, options.layers) not in done:
                    write(
                        step,
                        sums(model, held_out, tokenizer.pad_token_id),
                        method=method,
                        seed=seed,
                        seconds=round(seconds, 1),
                    )

            trainer.add_callback(Measure(record, options.steps))
            trainer.train()
    print_table(results, options.layers)


def read(results: Path) -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
        if results.is_file()
        else []
    )


def bits_per_byte(row: dict[str, Any]) -> float:
    return sum(row["nats"]) / sum(row["bytes"]) / math.log(2)


def print_table(results: Path, layers: int) -> None:
    """Print bits per byte above the teacher's, in brackets the 95 % interval minus ``cells``'."""
    rows = [row for row in read(results) if row["layers"] == layers]
    teacher = next(row for row in rows if row["method"] == "teacher")
    before = next(row for row in rows if row["method"] == "before")
    gap = bits_per_byte(before) - bits_per_byte(teacher)
    print(f"\nteacher {bits_per_byte(teacher):.4f} bits per byte; before {gap:+.4f}")
    steps = sorted({row["step"] for row in rows} - {0})
    print(
        f"{'method':22}{'seeds':>6}{'s/step':>8}"
        + "".join(f"{f'after {step}':>30}" for step in steps)
    )
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        if not own:
            continue
        pace = np.median([row["seconds"] / row["step"] for row in own])
        cells = [_cell(rows, method, step, teacher) for step in steps]
        print(
            f"{method:22}{len({row['seed'] for row in own}):6}{pace:8.1f}"
            + "".join(f"{cell:>30}" for cell in cells)
        )


def _cell(rows: list[dict[str, Any]], method: str, step: int, teacher: dict[str, Any]) -> str:
    ours, reference = (
        {row["seed"]: row for row in rows if row["method"] == name and row["step"] == step}
        for name in (method, "cells")
    )
    if not ours:
        return ""
    above = _ratios(list(ours.values())).value - bits_per_byte(teacher)
    seeds = sorted(ours.keys() & reference.keys())
    if method == "cells" or not seeds:
        return f"{above:.4f}"
    found = paired_difference(
        *(_ratios([each[seed] for seed in seeds]) for each in (ours, reference))
    )
    return f"{above:.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _ratios(rows: list[dict[str, Any]]) -> Ratios:
    """Return bits per byte of runs that differ in their seed."""
    bits = np.array([row["nats"] for row in rows]) / math.log(2)
    return Ratios(bits, np.array([row["bytes"] for row in rows], dtype=float))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=Path(".cache/tokenizers/llama2"),
        help="the student's folder, or phrases",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/cross_tokenizer"))
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument(
        "--steps",
        type=numbers,
        default=[15, 30, 60],
        help="evaluate after these steps; the last ends the run",
    )
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--answers", type=int, default=120)
    parser.add_argument("--held-out", type=int, default=80)
    parser.add_argument(
        "--layers", type=int, default=30, help="of the teacher's 30; half of them cost half"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument(
        "--table", action="store_true", help="print the results so far, run nothing"
    )
    options = parser.parse_args()
    unknown = set(options.methods) - METHODS.keys()
    if unknown:
        parser.error(
            f"unknown methods {', '.join(sorted(unknown))}; known are {', '.join(METHODS)}"
        )
    if options.table:
        print_table(options.output / "results.jsonl", options.layers)
    elif not options.tokenizer.is_dir() and str(options.tokenizer) != "phrases":
        parser.error(f"no folder {options.tokenizer}: `make tokenizers` fetches Llama-2's")
    else:
        run(options)


if __name__ == "__main__":
    main()
