from __future__ import annotations

import dataclasses

import pytest

from potstill.alignment import VocabularyComparison
from potstill.doctor.cost import ModelSize, Plan, estimate
from potstill.doctor.diagnosis import Diagnosis, Side
from potstill.doctor.measured_text import MeasuredText
from potstill.doctor.text import as_text


@pytest.fixture
def diagnosis() -> Diagnosis:
    size = ModelSize(3_210_000_000, 2_800_000_000, 128_256, 3072, 28, 3072, 15_000)
    side = Side(
        "t",
        128_256,
        size,
        "its own",
        "<|begin_of_text|>" * 9,
        "<|eot_id|>",
        "<s>",
        None,
        ["<|eot_id|>"] * 9,
        131_072,
    )
    plan = Plan(1000, 8, 500, 300, 480, 290, 4000)
    text = MeasuredText(
        100, 200, 0, 0, 50_000, 48_000, 30_000, 29_000, 700, 130_000, 29_000, 20_000, interiors=900
    )
    return Diagnosis(
        method="cross",
        reason="because",
        command="potstill distill t s",
        teacher=side,
        student=dataclasses.replace(side, chat_template=None, context_tokens=None),
        vocabularies=VocabularyComparison("different", 0, 900, 1000, 1000, (0, "a", "b")),
        data="d",
        text=text,
        teacher_bits_per_byte=None,
        plan=plan,
        costs={name: estimate(name, size, size, plan, card="h100") for name in ("text", "cross")},
        card="h100",
        notes=["fix this " * 30],
    )


def test_verdict_and_command_come_first_and_notes_last(diagnosis: Diagnosis) -> None:
    lines = as_text(diagnosis).splitlines()
    assert lines[0] == "verdict   cross: because"
    assert lines[1] == "command   potstill distill t s"
    assert lines[-1].strip().startswith("fix")
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    "shown",
    ["3.21 B", "99.7%   900 of them inside", "  66.7%", "90% of the student's", "PFLOP", " min\n"],
)
def test_numbers_are_shown_in_units_that_can_be_read(diagnosis: Diagnosis, shown: str) -> None:
    assert shown in as_text(diagnosis)


def test_columns_are_aligned_for_any_content(diagnosis: Diagnosis) -> None:
    lines = as_text(diagnosis).splitlines()
    place = next(line.index("student") for line in lines if line.lstrip().startswith("teacher "))
    table = [
        line
        for line in lines
        if line.startswith(("parameters", "  opens", "context", "generation", "chat"))
    ]
    assert len(table) == 5
    assert all(line[place - 1] == " " and line[place] != " " for line in table)


def test_without_data_or_card_the_page_names_the_missing_flags(diagnosis: Diagnosis) -> None:
    costs = {name: dataclasses.replace(cost, hours=None) for name, cost in diagnosis.costs.items()}
    page = as_text(dataclasses.replace(diagnosis, text=None, card=None, costs=costs))
    assert "--data measures" in page
    assert "--card h100 estimates the time" in page
