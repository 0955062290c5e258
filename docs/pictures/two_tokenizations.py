"""Draw docs/two-tokenizations.svg: one sentence in two tokenizations, aligned by bytes.

    python docs/pictures/two_tokenizations.py FOLDER

FOLDER contains tokenizer.model (see benchmarks/cross_tokenizer.py). The upper row shows SmolLM2's
tokens, the lower row those of a SentencePiece vocabulary like Llama 2's. Colors show the kind of
each student position; dashed lines show boundaries that both tokenizations have.
"""

from __future__ import annotations

import sys
from itertools import accumulate, pairwise
from pathlib import Path

import matplotlib.pyplot as plt
from transformers import LlamaTokenizer

from potstill.alignment import VocabularyCells, align, token_bytes
from potstill.models import load_tokenizer

TEXT = "Rain evaporates, says the docstring of rainfall_2026."
COLORS = {"root": "#9ecae1", "interior": "#c7e9c0", "elsewhere": "#fdd0a2", "teacher": "#e8e8e8"}


def spans(pieces: list[bytes]) -> list[tuple[int, int]]:
    return list(pairwise([0, *accumulate(map(len, pieces))]))


def main(folder: str) -> None:
    teacher, student = load_tokenizer("demo"), LlamaTokenizer.from_pretrained(folder)
    tokens = [token_bytes(teacher), token_bytes(student)]
    # SentencePiece adds a space before a text. The "x\n" keeps it out of the sentence.
    text = "x\n" + TEXT
    ids = [tokenizer.encode(text, add_special_tokens=False) for tokenizer in (teacher, student)]
    masks = [[True] * len(one) for one in ids]
    cells = VocabularyCells(teacher, student)
    found = align(
        ids[0],
        masks[0],
        ids[1],
        masks[1],
        cells=cells,
        teacher_tokens=tokens[0],
        student_tokens=tokens[1],
    )
    assert found is not None
    pieces = [[strings[i] or b"" for i in one] for strings, one in zip(tokens, ids, strict=True)]
    skip = [len(b"".join(one)) - len(TEXT.encode()) for one in pieces]
    figure, axes = plt.subplots(figsize=(13, 2.1))
    kinds = [
        "elsewhere" if k < 0 else "interior" if d else "root"
        for k, d in zip(found.teacher_index, found.depth, strict=True)
    ]
    edges = []
    for row, (one, first) in enumerate(zip(pieces, skip, strict=True)):
        kept = [
            (begin - first, end - first, i)
            for i, (begin, end) in enumerate(spans(one))
            if begin >= first
        ]
        edges.append({begin for begin, _, _ in kept} | {end for _, end, _ in kept})
        for begin, end, i in kept:
            color = COLORS["teacher" if row == 0 else kinds[i]]
            axes.barh(
                1 - row,
                end - begin,
                left=begin,
                height=0.62,
                color=color,
                edgecolor="black",
                linewidth=0.8,
            )
            axes.text(
                (begin + end) / 2,
                1 - row,
                one[i].decode().replace(" ", "␣"),
                ha="center",
                va="center",
                family="monospace",
            )
    for edge in edges[0] & edges[1]:
        axes.axvline(edge, color="black", linewidth=0.6, linestyle=(0, (3, 3)), zorder=0)
    for name, color in list(COLORS.items())[:3]:
        axes.barh(0, 0, color=color, edgecolor="black", label=name)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=3, frameon=False)
    axes.set_yticks([1, 0], ["teacher", "student"])
    axes.set_xticks([])
    axes.set_frame_on(False)
    axes.set_xlim(0, len(TEXT.encode()))
    plt.rcParams["svg.hashsalt"] = "potstill"
    figure.savefig(
        Path(__file__).parents[1] / "two-tokenizations.svg",
        bbox_inches="tight",
        metadata={"Date": None},
    )


if __name__ == "__main__":
    main(sys.argv[1])
