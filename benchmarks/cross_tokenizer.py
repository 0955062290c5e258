"""Which method teaches a student with other tokens best? SmolLM2-135M → itself with a SentencePiece vocabulary of 32 000 tokens.

    make tokenizers                                       # Llama-2's, the default of --tokenizer
    python benchmarks/cross_tokenizer.py                  # all methods, three seeds: two hours on two cores
    python benchmarks/cross_tokenizer.py --layers 15 --seeds 0 --methods text,cells --steps 25,50
    python benchmarks/cross_tokenizer.py --tokenizer phrases --output runs/phrases    # a student that has " of the" as one token
    python benchmarks/cross_tokenizer.py --table          # what has been measured so far

The teacher answers prompts at temperature 1; every method trains the same student on the same answers in the same order, at a
constant learning rate. Measured are bits per byte on held-out answers of the teacher, less the teacher's own: in expectation the
KL per byte from teacher to student, whatever the tokens. Intervals are paired: conversations are resampled, seeds averaged.

Each measurement is a line of OUTPUT/results.jsonl, written when it is made. A run that is cut off is made again from its first
step when the command is given again; finished ones are not.
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
import torch
from transformers import PreTrainedTokenizerFast, TrainerCallback

from potstill import DistillationConfig, DistillationTrainer, keep_layers, load_model
from potstill.data import (
    PLAIN_CHAT_TEMPLATE,
    read_conversations,
    read_prompts,
    tokenize_conversations,
)
from potstill.evaluation import score_tokens
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
    """The teacher's answers, sampled once: as its logits say, without top-k or top-p."""
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
    """A byte-level tokenizer whose tokens go beyond words, up to the next punctuation: the student spans the teacher's tokens."""
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


def sums(model: Any, dataset: Any, pad: int) -> tuple[list[float], list[int]]:
    """Nats and bytes of each conversation."""
    scores = score_tokens(model.eval(), dataset, pad_token_id=pad)
    nats = torch.zeros(len(dataset), dtype=torch.float64).index_add_(
        0, scores.conversation, scores.nll.double()
    )
    return nats.tolist(), scores.answer_bytes.tolist()


class Measure(TrainerCallback):
    """Writes a line at each of the chosen steps; ``seconds`` are those of training alone."""

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

    def write(step: int, measured: tuple[list[float], list[int]], **more: Any) -> None:
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
    """Bits per byte above the teacher's, and in brackets the 95 % interval of the difference to ``cells`` at the same step."""
    rows = [row for row in read(results) if row["layers"] == layers]
    teacher = next(row for row in rows if row["method"] == "teacher")
    before = next(row for row in rows if row["method"] == "before")
    print(
        f"\nteacher {bits_per_byte(teacher):.4f} bits per byte; before {bits_per_byte(before) - bits_per_byte(teacher):+.4f}"
    )
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
    ours, theirs = (
        {
            row["seed"]: np.array(row["nats"])
            for row in rows
            if row["method"] == name and row["step"] == step
        }
        for name in (method, "cells")
    )
    if not ours:
        return ""
    size = np.array(teacher["bytes"]) * math.log(2)
    above = float((np.mean(list(ours.values()), 0) - np.array(teacher["nats"])).sum() / size.sum())
    seeds = ours.keys() & theirs.keys()
    if method == "cells" or not seeds:
        return f"{above:.4f}"
    difference = np.mean([ours[seed] - theirs[seed] for seed in seeds], 0)
    drawn = np.random.default_rng(0).multinomial(
        len(size), np.full(len(size), 1 / len(size)), size=4000
    )
    low, high = np.percentile((drawn @ difference) / (drawn @ size), [2.5, 97.5])
    return f"{above:.4f} [{low:+.4f}, {high:+.4f}]"


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
        help="measured after so many; the last ends the run",
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
        "--table", action="store_true", help="print what has been measured, and measure nothing"
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
