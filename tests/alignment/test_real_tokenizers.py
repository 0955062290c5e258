"""Test real tokenizers: Llama-3, Llama-2, Qwen3, Gemma-3, SmolLM2 (`make tokenizers`)."""

from __future__ import annotations

import argparse
import ast
import collections
import datetime
import functools
import inspect
import logging
import os
import random
import statistics
import subprocess
import textwrap
import threading
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from alignment.toys import by_range
from potstill.alignment import VocabularyCells, align, token_bytes
from potstill.data import PLAIN_CHAT_TEMPLATE, tokenize_pairs
from potstill.models import load_tokenizer

FOLDER = Path(__file__).parents[2] / ".cache" / "tokenizers"
FAMILIES = ("llama3", "llama2", "qwen3", "gemma3", "smollm2")
PAIRS = (
    ("llama3", "llama2"),
    ("llama3", "smollm2"),
    ("qwen3", "llama2"),
    ("gemma3", "smollm2"),
    ("smollm2", "llama2"),
)
missing = not (FOLDER / ".ready").is_file() and not os.environ.get("CI")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing, reason="no tokenizers on this disk: run `make tokenizers`"),
]

HARD = (
    *(
        "\n",
        "\n\n\n",
        "\t",
        "\r\n",
        "  ",
        "        ",
        " ",
        "中文字",
        "日本語",
        "한국어",
        "नमस्ते",
        "👍🏽",
        "👩‍👩‍👧",
        "🇪🇸",
        "\u00a0",
        "\u200b",
    ),
    *(
        "<0x0A>",
        "</s>x",
        "the",
        " rain",
        "é",
        "ﬁ",
        "x=1",
        "2024",
        "'s",
        "\\n",
        "→",
        "q\u0323\u0307",
    ),
)
TEXT = st.lists(
    st.sampled_from(HARD) | st.text(st.characters(exclude_categories=("Cs",)), max_size=5),
    max_size=15,
).map("".join)


@functools.cache
def opened(family: str) -> Any:
    tokenizer = (
        load_tokenizer("demo")
        if family == "smollm2"
        else AutoTokenizer.from_pretrained(FOLDER / family)
    )
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
    return tokenizer


@functools.cache
def tokens_of(family: str) -> list[bytes | None]:
    return token_bytes(opened(family))


@functools.cache
def cells_of(*pair: str) -> VocabularyCells:
    return VocabularyCells(*map(opened, pair))


def ids_of(family: str, text: str) -> list[int]:
    return list(opened(family).encode(text, add_special_tokens=False, split_special_tokens=True))


def as_read(family: str, text: str) -> bytes:
    """Return the text after the tokenizer's known normalization."""
    text = unicodedata.normalize("NFC", text) if family == "qwen3" else text
    return (text.replace("▁", " ") if family in ("llama2", "gemma3") else text).encode()


def can_spell(family: str, text: str) -> bool:
    """Return False if SmolLM2 would silently drop bytes (control characters, planes 4 and up)."""
    return (
        all(bytes([byte]) in tokens_of(family) for byte in set(text.encode()))
        or family != "smollm2"
    )


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_the_bytes_of_a_texts_ids_joined_are_the_texts_bytes(family: str, text: str) -> None:
    assume(can_spell(family, text))
    joined = b"".join(tokens_of(family)[i] or b"?" for i in ids_of(family, text))
    expected = as_read(family, text)
    assert joined == expected or (family == "llama2" and joined == b" " + expected)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_any_text_aligns_or_is_read_as_other_bytes(pair: tuple[str, str], text: str) -> None:
    assume(all(can_spell(family, text) for family in pair))
    ids = [ids_of(family, text) for family in pair]
    masks = [[True] * len(one) for one in ids]
    t, s = map(tokens_of, pair)
    found = align(
        ids[0],
        masks[0],
        ids[1],
        masks[1],
        cells=cells_of(*pair),
        teacher_tokens=t,
        student_tokens=s,
    )
    if found is None:
        assert as_read(pair[0], text) != as_read(pair[1], text)
        return
    ahead = [
        [b"".join(tokens[i] or b"" for i in one[k:]) for k in range(len(one))]
        for tokens, one in zip((t, s), ids, strict=True)
    ]
    for i, k in enumerate(found.teacher_index):
        if k >= 0:
            assert ahead[0][k] == ahead[1][i - found.depth[i]]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_the_fast_path_is_the_dense_reference(pair: tuple[str, str]) -> None:
    cells = cells_of(*pair)
    q = torch.rand(len(cells.teacher_cells), dtype=torch.float64)
    prefixes = {pieces[:d] for pieces in cells.segmentation[::997] for d in range(len(pieces))}
    for emitted in sorted(prefixes)[:40]:
        torch.testing.assert_close(
            by_range(cells, q, emitted), cells.target(q, emitted), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_teacher_token_is_segmented_into_its_own_bytes(pair: tuple[str, str]) -> None:
    student, have = tokens_of(pair[1]), set(tokens_of(pair[1]))
    for string, pieces in zip(tokens_of(pair[0]), cells_of(*pair).segmentation, strict=True):
        if string is not None and (pieces or all(bytes([byte]) in have for byte in string)):
            assert b"".join(student[u] or b"?" for u in pieces) == string


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_same_tokenizer_every_cell_is_the_tokens_of_one_byte_string(family: str) -> None:
    cells = cells_of(family, family)
    assert cells.count == len({string for string in tokens_of(family) if string is not None}) + 1
    known = cells.student_cells >= 0
    assert torch.equal(cells.teacher_cells[known], cells.student_cells[known])


def prose() -> list[str]:
    modules = (
        argparse,
        ast,
        collections,
        datetime,
        inspect,
        logging,
        random,
        statistics,
        subprocess,
        textwrap,
        threading,
    )
    docs = [
        inspect.getdoc(value) or ""
        for module in modules
        for value in (module, *vars(module).values())
        if callable(value)
    ]
    lines = [" ".join(paragraph.split()) for doc in docs for paragraph in doc.split("\n\n")]
    return sorted({line for line in lines if len(line) > 250 and ">>>" not in line})


def code() -> list[str]:
    return [
        inspect.getsource(module)
        for module in (argparse, ast, datetime, functools, inspect, textwrap)
    ]


@pytest.mark.parametrize("texts", [prose, code])
def test_llama_3_gives_a_target_for_nearly_all_llama_2_tokens(texts: Any) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]}
        for text in texts()
    ]
    teacher, student = map(opened, ("llama3", "llama2"))
    _, counts = tokenize_pairs(
        rows, teacher, student, cells_of("llama3", "llama2"), max_length=10**6
    )
    assert counts.with_target >= 0.99
    assert counts.disagreeing_roots <= 0.01 * counts.roots
