"""Examine pairs of model folders; they have weights only where a test needs them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import CHATML, conversations, sentencepiece_tokenizer, tiny_model, toy_tokenizer
from potstill import cli
from potstill.commands.distill import DistillRecipe
from potstill.commands.doctor import DoctorRecipe
from potstill.doctor import examination
from potstill.doctor.diagnosis import Diagnosis
from potstill.doctor.examination import examine, quick_check
from potstill.doctor.text import as_text
from potstill.errors import ConfigError, OpaqueTokenizer, VocabularyMismatch

Folder = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Return a function that makes a folder with a configuration and a tokenizer, no weights."""

    def make(
        name: str,
        tokenizer: Any,
        *,
        rows: int | None = None,
        layers: int = 4,
        stops: list[int] | None = None,
    ) -> str:
        model = tiny_model(rows=rows or len(tokenizer), layers=layers)
        model.config.save_pretrained(tmp_path / name)
        model.generation_config.eos_token_id = stops or tokenizer.eos_token_id
        model.generation_config.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in conversations(20)))
    return str(path)


def word_tokenizer() -> Any:
    """Return a WordPiece tokenizer, whose bytes cannot be recovered."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordPiece({"the": 0, "[UNK]": 1}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[UNK]", pad_token="[UNK]")


def letters_tokenizer(letters: str) -> Any:
    """Return a byte-level tokenizer of a few letters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def relabelled(tokenizer: Any) -> Any:
    """Return the same tokenizer with two ids exchanged."""
    import copy

    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other = copy.deepcopy(tokenizer)
    other._tokenizer = Tokenizer.from_str(json.dumps(state))
    return other


def test_padded_head_rows_still_allow_logits(folder: Folder, data: str) -> None:
    found = examine(
        folder("t", toy_tokenizer(), rows=320),
        folder("s", toy_tokenizer(), rows=272, layers=2),
        data=data,
    )
    assert found.method == "logits"
    assert "the heads of 320 and 272 rows are cut to the 266 shared" in found.reason
    assert found.text is not None
    assert found.text.with_target == 1.0
    assert (found.text.split_differently, found.text.conversations) == (0, 20)
    assert found.notes == []


def test_permuted_ids_are_unsafe_for_logits_and_the_first_difference_is_named(
    folder: Folder, data: str
) -> None:
    teacher, student = (
        folder("t", toy_tokenizer()),
        folder("s", relabelled(toy_tokenizer()), layers=2),
    )
    found = examine(teacher, student, data=data)
    assert found.vocabularies.relation == "permuted"
    assert found.method == "cross"
    assert "is 'a' in the teacher's, 'b' in the student's" in found.reason
    assert found.text is not None
    assert found.text.with_target == 1.0  # relabelling changes nothing across tokenizers


def test_different_tokenizers_are_measured_on_the_users_own_text(folder: Folder, data: str) -> None:
    student = sentencepiece_tokenizer(chat_template=CHATML.replace("<|im_end|>", "</s>"))
    found = examine(folder("t", toy_tokenizer()), folder("s", student, layers=2), data=data)
    text = found.text
    assert text is not None
    assert found.method == "cross"
    assert f"reaches {text.with_target:.1%} of the positions" in found.reason
    assert text.roots + text.interiors <= text.supervised_tokens
    assert text.one_to_one <= text.roots
    assert (
        sum(count for _, count in text.untaught)
        <= text.supervised_tokens - text.roots - text.interiors
    )
    assert text.teacher_tokens != text.tokens


def test_text_is_chosen_if_too_few_positions_have_a_target(
    folder: Folder, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examination, "ENOUGH_TARGETS", 1.01)
    found = examine(
        folder("t", toy_tokenizer()), folder("s", relabelled(toy_tokenizer()), layers=2), data=data
    )
    assert found.method == "text"
    assert "--method text" in found.command
    assert found.costs.keys() == {"text"}


def test_without_data_the_vocabularies_decide_and_the_cost_is_for_a_million_tokens(
    folder: Folder,
) -> None:
    found = examine(
        folder("t", toy_tokenizer()),
        folder("s", sentencepiece_tokenizer(), layers=2),
        max_length=500,
    )
    assert found.method == "cross"
    assert found.text is None
    assert found.plan.steps * found.plan.conversations_a_step * found.plan.tokens >= 1e6
    assert "--data DATA" in found.command


def test_the_planned_run_is_the_one_that_distill_would_make(folder: Folder, data: str) -> None:
    pair = folder("t", toy_tokenizer()), folder("s", toy_tokenizer(), layers=2)
    assert (
        examine(*pair, data=data).plan.steps == 3 * 3
    )  # 18 conversations to train on, 8 a step, three times
    found = examine(
        *pair,
        data=data,
        max_steps=7,
        batch_size=4,
        gradient_accumulation_steps=2,
        chat_template="plain",
    )
    assert (found.plan.steps, found.plan.conversations_a_step) == (7, 8)
    command, recipe = cli.parse(shlex.split(found.command)[1:])
    assert command == "distill"
    assert (recipe.max_steps, recipe.batch_size, recipe.method, recipe.max_length) == (
        7,
        4,
        "logits",
        1024,
    )
    assert "max-length" not in found.command


def test_the_defaults_of_doctor_and_distill_are_the_same() -> None:
    parameters = inspect.signature(examine).parameters
    distills = {item.name: item.default for item in dataclasses.fields(DistillRecipe)}
    for item in dataclasses.fields(DoctorRecipe):
        if item.name in parameters and item.default is not dataclasses.MISSING:
            assert parameters[item.name].default == item.default
            if item.name in distills and item.name != "data":
                assert distills[item.name] == item.default, item.name


def test_a_turn_that_generation_would_not_stop_at_is_noted(folder: Folder) -> None:
    found = examine(
        folder("t", toy_tokenizer()),
        folder("s", toy_tokenizer(), layers=2, stops=[3]),
        max_length=512,
    )
    (note,) = found.notes
    assert "the student's chat template ends a turn with <|im_end|>" in note
    assert "it would not stop" in note


def test_cut_conversations_short_contexts_and_missing_memory_are_noted(
    folder: Folder, data: str
) -> None:
    pair = folder("t", toy_tokenizer()), folder("s", toy_tokenizer(), layers=4)
    notes = "\n".join(examine(*pair, data=data, max_length=40).notes)
    assert "of 20 conversations are cut at --max-length" in notes
    assert "the student is not smaller than the teacher" in notes
    long = "\n".join(examine(*pair, max_length=600).notes)
    assert "up to 600 tokens are longer than the 512 that the student can read" in long
    assert "does not fit on one l4" in "\n".join(examine(*pair, batch_size=10**5, card="l4").notes)


def across_words(tokenizer: Any) -> Any:
    """Add a token that ends one word and begins the next."""
    tokenizer.add_tokens(["he rain"])
    return tokenizer


def test_a_badly_aligned_pair_gets_a_note_with_its_tokens(folder: Folder, data: str) -> None:
    teacher = folder("t", toy_tokenizer())
    found = examine(teacher, folder("alike", relabelled(toy_tokenizer()), layers=2), data=data)
    assert not any("less alike" in note for note in found.notes)
    found = examine(
        teacher, folder("unlike", across_words(relabelled(toy_tokenizer())), layers=2), data=data
    )
    (note,) = (note for note in found.notes if "less alike" in note)
    assert "'he rain'" in note


def test_the_same_tokens_split_differently_are_noted(folder: Folder, data: str) -> None:
    found = examine(
        folder("t", toy_tokenizer()),
        folder("s", across_words(toy_tokenizer()), layers=2),
        data=data,
    )
    assert found.method == "logits"
    (note,) = (note for note in found.notes if "split differently" in note)
    assert "20 of 20 conversations" in note


def test_quick_check_notes_that_the_teacher_reads_a_template_that_is_not_its_own() -> None:
    """Before a run: on-policy, the teacher would correct answers in a format it does not know."""
    own = toy_tokenizer()
    other_words = str(own.chat_template) + "{{ '' }}"
    for template in (other_words, None):
        assert quick_check(toy_tokenizer(chat_template=template), own, "logits") is None
    changed = toy_tokenizer(chat_template="Be kind. " + str(own.chat_template))
    assert "the teacher reads the student's" in (quick_check(changed, own, "logits") or "")
    assert quick_check(changed, own, "cross") == quick_check(own, own, "cross")
    refusing = toy_tokenizer(chat_template="{{ raise_exception('no') }}")
    assert quick_check(refusing, own, "logits") is None


def test_quick_check_raises_for_impossible_pairs_and_remarks_on_a_costlier_method() -> None:
    toy, other = toy_tokenizer(), sentencepiece_tokenizer()
    assert quick_check(toy, other, "text") is None
    assert quick_check(toy, toy, "logits") is None
    assert quick_check(toy, other, "cross") is None
    assert "--method logits is cheaper" in (quick_check(toy, toy, "cross") or "")
    with pytest.raises(VocabularyMismatch, match="id 0 is '!' in the teacher's and '<unk>'"):
        quick_check(toy, other, "logits")
    with pytest.raises(OpaqueTokenizer, match="--method text"):
        quick_check(toy, word_tokenizer(), "cross")
    with pytest.raises(VocabularyMismatch, match="no token in common"):
        quick_check(letters_tokenizer("abc"), letters_tokenizer("xyz"), "cross")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("opaque", "cannot be recovered"),
        ("nothing shared", "no token in common"),
        ("lossy template", "loses the assistant's text"),
        ("nothing alignable", "nothing to learn"),
        ("no template", "--chat-template plain"),
        ("no rows", "nothing to learn"),
        ("unknown card", "use one of a10"),
        ("unknown precision", "bf16, fp16, fp32"),
        ("weights without data", "give --data"),
        ("not a model", "no config.json there"),
        ("no tokenizer", "no tokenizer there"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    folder: Folder,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    message: str,
) -> None:
    teacher, student, more = folder("t", toy_tokenizer()), "s", ["--data", data]
    lossy = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    adding = CHATML.replace(
        "message['content']", "message['content'] + message['content'][:1]"
    ).replace("<|im_end|>", "</s>")
    if name == "opaque":
        student = folder("s", word_tokenizer(), rows=272)
    elif name == "nothing shared":
        teacher, student = (
            folder(name, letters_tokenizer(name), rows=272) for name in ("abc", "xyz")
        )
    elif name == "lossy template":
        student = folder("s", toy_tokenizer(chat_template=lossy))
    elif name == "nothing alignable":
        student = folder("s", sentencepiece_tokenizer(chat_template=adding))
    elif name == "no template":
        student = folder("s", sentencepiece_tokenizer())
    else:
        student = folder("s", toy_tokenizer(), layers=2)
        more += {
            "unknown card": ["--card", "abacus"],
            "unknown precision": ["--precision", "fp12"],
        }.get(name, [])
    if name == "no rows":
        Path(data).write_text("")
    if name == "weights without data":
        more = ["--with-weights"]
    if name == "not a model":
        (Path(student) / "config.json").unlink()
    if name == "no tokenizer":
        for file in Path(student).glob("tokenizer*"):
            file.unlink()
    assert cli.main(["doctor", teacher, student, *more]) == 2
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("potstill:")
    ]
    assert message in line


def test_the_page_fits_a_terminal_and_json_has_the_same_content(
    folder: Folder, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    student = sentencepiece_tokenizer()
    arguments = [
        "doctor",
        folder("t", toy_tokenizer()),
        folder("s", student, layers=2),
        "--data",
        data,
        "--chat-template",
        "plain",
    ]
    assert cli.main([*arguments, "--card", "H100"]) == 0
    page, found, rows = capsys.readouterr().out.partition("\nwhat ")
    assert found
    assert rows.count("\n--- ") == 3  # the first rows, as the student will learn them
    lines = page.splitlines()
    assert len(lines) < 45
    assert all(len(line) <= 120 for line in lines if not line.startswith("command"))
    assert lines[0].startswith("verdict   cross: ")
    for word in ("chat template", "generation stops at", "inside a teacher token", "GFLOP", "H100"):
        assert word in page
    assert cli.main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["method"] == "cross"
    assert printed["costs"].keys() == {"text", "cross"}
    assert 0 < printed["text"]["with_target"] <= 1
    assert printed["costs"]["cross"]["flops"] > printed["costs"]["text"]["flops"]
    assert printed["student"]["chat_template"] == "plain"


def test_the_teacher_is_scored_under_both_templates_when_asked(
    model_folder: Callable[..., Path], folder: Folder, data: str
) -> None:
    student = folder(
        "s",
        toy_tokenizer(chat_template=CHATML.replace("message['role'] +", "'~' + message['role'] +")),
        layers=2,
    )
    found: Diagnosis = examine(
        str(model_folder(layers=3)), student, data=data, with_weights=True, device="cpu"
    )
    assert found.teacher_bits_per_byte is not None
    own, students = found.teacher_bits_per_byte.values()
    assert own > 0
    assert own != students
    assert "under the student's" in as_text(found)


def test_an_unknown_card_is_refused_before_any_model_is_opened() -> None:
    with pytest.raises(ConfigError, match="card 'abacus'"):
        examine("nobody/nothing", "nobody/nothing", card="abacus")
