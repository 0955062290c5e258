"""A sparse capture: what is stored has the right mean and size, and trains by forward KL alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import conversations, toy_tokenizer, write_rows
from potstill import cli
from potstill.data import BatchLayout, encode_conversation
from potstill.losses import Head
from potstill.models import ModelOpener
from potstill.teachers import CapturedTeacher, LocalTeacher, capture_conversations
from potstill.teachers.sparse import (
    PER_TOKEN,
    decode_sparse,
    encode_sparse,
    mass_grid,
    pack_ids,
    unpack_ids,
)

FLOAT = ModelOpener(device="cpu", dtype="float32")


def dense(target: Any, rows: int) -> torch.Tensor:
    owner = torch.repeat_interleave(target.drawn.counts)
    full = torch.zeros(len(target.drawn.counts), rows)
    return full.index_put_((owner, target.drawn.ids), target.drawn.masses, accumulate=True)


@pytest.mark.parametrize("rows", [2, 49_152, 128_256, 151_936, 262_144])
def test_packed_ids_are_the_ids(rows: int) -> None:
    ids = np.random.default_rng(0).integers(0, rows, 1001)
    ids[:2] = 0, rows - 1
    assert (unpack_ids(pack_ids(ids), 1001) == ids).all()
    assert len(unpack_ids(pack_ids(ids[:0]), 0)) == 0


def test_what_is_stored_has_the_teachers_distribution_entropy_and_nll_as_its_mean() -> None:
    random = torch.Generator().manual_seed(0)
    states = torch.randn(1, 8, generator=random)
    head = Head(torch.randn(30, 8, generator=random))
    labels = torch.tensor([7])
    log_q = (states @ head.weight.T).double().log_softmax(-1)
    draws = 20_000
    columns = encode_sparse(
        states.expand(draws, -1), head, labels.expand(draws), threshold=0.05, seed=1
    )
    target = decode_sparse(columns, threshold=0.05, vocabulary_rows=30)
    q = log_q.exp()[0].float()
    found = dense(target, 30)
    error = found.mean(0) - q
    deviation = ((found.var(0) + 0.05 * q) / draws).sqrt()  # a rare token may never be drawn
    assert bool((error.abs() <= 5 * deviation).all())
    assert target.entropy.mean() == pytest.approx(float(-(q * q.log()).sum()), abs=0.002)
    assert target.nll.mean() == pytest.approx(float(-log_q[0, 7]), abs=0.005)
    torch.testing.assert_close(found.sum(-1), torch.ones(draws))


def test_the_grid_of_masses_covers_every_mass_that_is_stored() -> None:
    grid = mass_grid(0.03)
    assert grid[0] == 1
    assert grid[-1] == pytest.approx(0.015)


@pytest.fixture
def teacher(model_folder: Callable[..., Path]) -> Path:
    return model_folder(seed=1)


def test_a_sparse_capture_is_repeatable_and_does_not_depend_on_the_batch(
    teacher: Path, tmp_path: Path
) -> None:
    for name, order in (("one", 1), ("other", -1)):
        rows = conversations(12)[::order]
        capture_conversations(
            str(teacher), rows, tmp_path / name, keep="sparse", max_length=512, opener=FLOAT
        )
    one, other = (CapturedTeacher(tmp_path / name) for name in ("one", "other"))
    encoded = [encode_conversation(row, toy_tokenizer()) for row in conversations(12)]
    targets = [
        stored.targets(layout(encoded[:5]))
        for stored, layout in ((one, BatchLayout(265)), (other, BatchLayout(265)))
    ]
    torch.testing.assert_close(dense(targets[0], 272), dense(targets[1], 272))
    live = LocalTeacher(FLOAT.model(teacher)).targets(BatchLayout(265)(encoded[:5]))
    q = (live.hidden @ live.head.weight.T).softmax(-1)  # type: ignore[union-attr]
    large = q >= 0.03
    torch.testing.assert_close(dense(targets[0], 272)[large], q[large], rtol=0.02, atol=0)


def potstill(*arguments: str) -> int:
    return cli.main([*arguments, "--precision", "fp32", "--device", "cpu"])


def train(*flags: str) -> int:
    given = ("--data", "data.jsonl", "--output-dir", "run", "--max-steps", "4", *flags)
    return potstill("distill", "capture", "student", *given)


@pytest.fixture
def sparse_capture(pair_folder: Path) -> Path:
    write_rows(Path("data.jsonl"), conversations(16))
    given = ("--data", "data.jsonl", "--output-dir", "capture", "--keep", "sparse")
    assert potstill("capture", "teacher", *given) == 0
    (pair_folder / "teacher").unlink()
    return pair_folder


@pytest.mark.usefixtures("sparse_capture")
def test_a_student_trains_evaluates_and_reports_from_a_sparse_capture() -> None:
    assert train() == 0
    measured = json.loads(Path("run/evaluation.json").read_text())
    assert measured["after"]["kl_nats_per_token"] < measured["before"]["kl_nats_per_token"]
    assert Path("run/report.html").is_file()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--divergence", "reverse_kl"), "divergence reverse_kl at temperature 1: a sparse"),
        (("--temperature", "2"), "temperature 2: a sparse capture is unbiased for forward_kl"),
        (("--method", "cross"), "method cross needs the teacher's hidden states"),
    ],
)
@pytest.mark.usefixtures("sparse_capture")
def test_a_loss_that_would_be_biased_is_refused_before_anything_is_written(
    flags: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*flags) == 2
    assert named in capsys.readouterr().err
    assert not Path("run").exists()


def test_the_columns_have_one_byte_a_token() -> None:
    head = Head(torch.randn(300, 8, generator=torch.Generator().manual_seed(3)))
    states = torch.randn(40, 8, generator=torch.Generator().manual_seed(4))
    columns = encode_sparse(states, head, torch.zeros(40).long(), threshold=0.03, seed=0)
    assert all(columns[name].nbytes == 40 for name in PER_TOKEN)
    assert all(column.dtype == np.uint8 for column in columns.values())
