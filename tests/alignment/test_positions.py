from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from alignment.toys import by_range, letters, sentencepiece
from conftest import toy_tokenizer
from potstill.alignment import Positions, VocabularyCells, align, cached_cells, token_bytes

LETTERS = (
    letters("abc", "a b", "ab c", "c c", "b c"),
    letters("abc", "b c", "a bc", "a a", "c c", "cc a"),
)
BYTES = toy_tokenizer(), sentencepiece()
CELLS = {pair: VocabularyCells(*pair) for pair in (LETTERS, BYTES)}


def aligned(
    pair: Any, teacher_ids: list[int], student_ids: list[int], masks: Any = None
) -> Positions | None:
    masks = masks or ([True] * len(teacher_ids), [True] * len(student_ids))
    t, s = map(token_bytes, pair)
    return align(
        teacher_ids,
        masks[0],
        student_ids,
        masks[1],
        cells=CELLS[pair],
        teacher_tokens=t,
        student_tokens=s,
    )


def expected(pair: Any, teacher_ids: list[int], student_ids: list[int]) -> list[tuple[int, int]]:
    """Return (teacher index, depth) of each student token by brute force."""
    cells = CELLS[pair]
    t, s = (
        [len(strings[i] or b"") for i in ids]
        for strings, ids in zip(map(token_bytes, pair), (teacher_ids, student_ids), strict=True)
    )
    found = []
    for i in range(len(student_ids)):
        place = (-1, 0)
        for k, v in enumerate(teacher_ids):
            for d in range(i + 1):
                pieces = cells.segmentation[v]
                followed = (
                    sum(s[: i - d]) == sum(t[:k])
                    and tuple(student_ids[i - d : i]) == pieces[:d]
                    and d < len(pieces)
                )
                if followed and sum(s[:i]) < sum(t[: k + 1]):
                    place = (k, d)
        found.append(place)
    return found


@given(st.text("abc", max_size=12), st.data())
def test_every_token_finds_the_teachers_token_by_the_definition(
    text: str, data: st.DataObject
) -> None:
    teacher, student = LETTERS
    cut = data.draw(st.integers(0, len(text)))
    teacher_ids = teacher.encode(text[:cut]) + teacher.encode(
        text[cut:]
    )  # a sample need not be as the tokenizer would have it
    student_ids = student.encode(text)
    found = aligned(LETTERS, teacher_ids, student_ids)
    assert found is not None
    places = [
        (k, d) if k >= 0 else (-1, 0) for k, d in zip(found.teacher_index, found.depth, strict=True)
    ]
    assert places == expected(LETTERS, teacher_ids, student_ids)
    assert found.roots + found.interiors == sum(k >= 0 for k, _ in places)


@given(st.text("abc", min_size=1, max_size=12))
def test_the_range_of_each_position_is_that_of_the_pieces_emitted(text: str) -> None:
    teacher_ids, student_ids = (tokenizer.encode(text) for tokenizer in LETTERS)
    found, cells = aligned(LETTERS, teacher_ids, student_ids), CELLS[LETTERS]
    assert found is not None
    q = torch.rand(len(cells.teacher_cells), dtype=torch.float64)
    for i, (k, depth) in enumerate(zip(found.teacher_index, found.depth, strict=True)):
        if k >= 0:
            emitted = tuple(student_ids[i - depth : i])
            assert cells.prefix_range(emitted) == (found.start[i], found.stop[i])
            target = by_range(cells, q, emitted)
            torch.testing.assert_close(target, cells.target(q, emitted))
            assert target[cells.student_cells[student_ids[i]]] > 0


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁"), max_size=30)
HARD = st.lists(
    st.sampled_from(
        [
            "\n",
            "\t",
            "\r\n",
            "    ",
            " ",
            "中文",
            "👍🏽",
            "e\u0301",
            "the",
            " the",
            "<0x0A>",
            "x",
            "\u00a0",
        ]
    ),
    max_size=12,
).map("".join)


@given(TEXT | HARD)
def test_any_text_aligns_and_every_root_is_at_the_same_byte(text: str) -> None:
    teacher_ids, student_ids = (
        tokenizer.encode(text, add_special_tokens=False) for tokenizer in BYTES
    )
    found = aligned(BYTES, teacher_ids, student_ids)
    assert found is not None
    t, s = map(token_bytes, BYTES)
    dummy = sum(len(s[u] or b"") for u in student_ids) - len(text.encode())
    for i, (k, depth) in enumerate(zip(found.teacher_index, found.depth, strict=True)):
        if k >= 0 and not depth:
            before = b"".join(t[v] or b"" for v in teacher_ids[:k])
            assert (b" " * dummy + before) == b"".join(s[u] or b"" for u in student_ids[:i])


def test_end_tokens_of_turns_are_aligned() -> None:
    teacher_ids, student_ids = (
        [*BYTES[0].encode("xthe"), 265],
        [*BYTES[1].encode("xthe", add_special_tokens=False), 2],
    )
    found = aligned(BYTES, teacher_ids, student_ids)
    assert found is not None
    assert (found.teacher_index[-1], found.depth[-1]) == (len(teacher_ids) - 1, 0)
    assert (found.start[-1], found.stop[-1]) == CELLS[BYTES].prefix_range()


def test_end_tokens_are_not_aligned_if_a_template_adds_a_space_before_one() -> None:
    teacher_ids, student_ids = (
        [*BYTES[0].encode("xt"), 265],
        [*BYTES[1].encode("xt ", add_special_tokens=False), 2],
    )
    found = aligned(BYTES, teacher_ids, student_ids)
    assert found is not None
    assert found.teacher_index == [-1, 0, 1, -1, -1]


def test_text_that_one_template_adds_before_the_answer_has_no_target() -> None:
    teacher_ids, student_ids = BYTES[0].encode("x the"), BYTES[1].encode("<0A>\nx the")
    found = aligned(BYTES, teacher_ids, student_ids)
    assert found is not None
    assert [k for k in found.teacher_index if k >= 0] == list(range(len(teacher_ids)))


def test_an_empty_answer_gives_the_end_token_a_target() -> None:
    found = aligned(BYTES, [265], [2])
    assert found is not None
    assert found.teacher_index == [0]


def test_different_texts_missing_turns_and_inner_special_tokens_give_none() -> None:
    assert aligned(BYTES, BYTES[0].encode("the"), BYTES[1].encode("thy")) is None
    assert aligned(BYTES, BYTES[0].encode("the"), []) is None
    assert aligned(BYTES, BYTES[0].encode("a<|im_end|>b"), BYTES[1].encode("a<|im_end|>b")) is None


def test_each_turn_is_aligned_with_the_same_turn() -> None:
    teacher_ids, student_ids = [120, 83, 120], [100, 60, 100]
    t, s = (
        [BYTES[0].convert_tokens_to_ids(c) for c in "xy"],
        [BYTES[1].convert_tokens_to_ids(c) for c in ("<0x78>", "<0x79>")],
    )
    teacher_ids, student_ids = [t[0], t[1], t[0]], [s[0], s[1], s[1], s[0]]
    found = aligned(BYTES, teacher_ids, student_ids, ([1, 0, 1], [1, 0, 0, 1]))
    assert found is not None
    assert found.teacher_index == [0, -1, -1, 2]


def test_cells_are_computed_once_per_pair_and_then_read(tmp_path: Any) -> None:
    first = cached_cells(*LETTERS, tmp_path)
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_mtime_ns
    again = cached_cells(*LETTERS, tmp_path)
    assert (first.segmentation, stamp) == (again.segmentation, file.stat().st_mtime_ns)
    cached_cells(*reversed(LETTERS), tmp_path)
    cached_cells(*LETTERS, tmp_path, student_end=0)
    assert len(list(tmp_path.iterdir())) == 3
