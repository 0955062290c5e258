"""Measure for how many student tokens a teacher with another tokenizer has a target.

    make tokenizers && python benchmarks/alignment.py            # all pairs
    python benchmarks/alignment.py llama3:llama2                 # one

Prose is docstring paragraphs of the standard library, code its modules, scripts a few sentences in
ten other scripts. The columns are: seconds to compute the cells, and their number; student tokens
per teacher token; the share of student tokens with a target (at a root, or inside a token whose
pieces it follows); the share of roots where the student's token is not the first piece of the
teacher's token ("disagree", as in `potstill doctor`), and where it is not even in the same cell
("other cell"); milliseconds to encode and align 2 048 student tokens, both tokenizers included.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from potstill.alignment import PieceCells, VocabularyCells
from potstill.data import PLAIN_CHAT_TEMPLATE, PairCounts, PairEncoder
from potstill.models import load_tokenizer

FOLDER = Path(__file__).parents[1] / ".cache" / "tokenizers"
PAIRS = ("llama3:llama2", "llama3:smollm2", "qwen3:llama2", "gemma3:smollm2", "smollm2:llama2")
SCRIPTS = [
    "Привет! Как дела? Дождь в Испании идёт в основном на равнине.",
    "今天的天气很好,我们去公园散步吧。模型蒸馏是一种压缩技术。",
    "日本語のトークナイザーは難しいです。カタカナとひらがながあります。",
    "한국어 문장도 있어야 합니다. 내일은 비가 옵니다.",
    "مرحبا بالعالم، كيف حالك اليوم؟ الطقس جميل.",
    "नमस्ते दुनिया, आज मौसम बहुत अच्छा है।",
    "Ελληνικά: η βροχή πέφτει κυρίως στην πεδιάδα.",
    "עברית: שלום עולם, מה שלומך היום?",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "👩‍👩‍👧‍👦 families 🇪🇸 flags 👍🏽 thumbs",
]


def paragraphs(modules: list[Path]) -> Iterator[str]:
    """Return docstring paragraphs of at least 250 characters, on one line each."""
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                    line = " ".join(paragraph.split())
                    if len(line) > 250 and ">>>" not in line:
                        yield line


def texts() -> dict[str, list[str]]:
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    code = [module.read_text(encoding="utf-8")[:6000] for module in modules[::3]]
    return {"prose": list(paragraphs(modules))[:240], "code": code[:60], "scripts": SCRIPTS}


def opened(family: str) -> Any:
    tokenizer = (
        load_tokenizer("demo")
        if family == "smollm2"
        else AutoTokenizer.from_pretrained(FOLDER / family)
    )
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
    return tokenizer


def measure(pair: str) -> None:
    teacher, student = map(opened, pair.split(":"))
    begun = time.perf_counter()
    cells = VocabularyCells(teacher, student)
    seconds = time.perf_counter() - begun
    encoders = (
        PairEncoder(teacher, student, PieceCells(cells)),
        PairEncoder(teacher, student, cells),
    )
    for kind, answers in texts().items():
        begun = time.perf_counter()
        (counts, teacher_tokens), (over_cells, _) = (
            counted(encode, answers) for encode in encoders
        )
        taken = 500 * (time.perf_counter() - begun) * 2048 / counts.supervised_tokens
        otherwise, disagree = (
            found.disagreeing_roots / found.roots for found in (counts, over_cells)
        )
        print(
            f"{pair:16} {kind:8} {seconds:6.1f} s {cells.count:8} {counts.supervised_tokens:8}"
            f" {counts.supervised_tokens / teacher_tokens:6.2f}"
            f" {counts.with_target:8.2%}"
            f" {otherwise:10.2%} {disagree:9.2%} {counts.not_alignable:8} {taken:6.1f} ms",
            flush=True,
        )


def counted(encode: PairEncoder, answers: list[str]) -> tuple[PairCounts, int]:
    """Counts of aligned tokens."""
    counts, teacher_tokens = PairCounts(), 0
    for answer in answers:
        row = encode(
            {
                "messages": [
                    {"role": "user", "content": "?"},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
        if row is None:
            counts.not_alignable += 1
        elif counts.add(row):
            teacher_tokens += sum(label >= 0 for label in row["teacher_labels"])
    return counts, teacher_tokens


if __name__ == "__main__":
    print(
        "pair             text       cells in    cells   tokens  ratio   target   disagree "
        "other cell skipped  per 2 048"
    )
    for name in sys.argv[1:] or PAIRS:
        measure(name)
