from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import sentencepiece_tokenizer, tiny_model, toy_tokenizer
from potstill.alignment import stop_tokens
from potstill.data import tokenize_conversations
from potstill.data.chat_templates import set_chat_template
from potstill.errors import ModelError, OpaqueTokenizer
from potstill.evaluation.scores import score_tokens, summarize
from potstill.models import load_model, load_tokenizer
from potstill.students.layers import save_student
from potstill.students.vocabulary_transfer import change_tokenizer, refuse_misread, token_sources


@pytest.fixture
def new_tokenizer() -> Any:
    tokenizer = sentencepiece_tokenizer()
    set_chat_template(tokenizer, "plain")
    return tokenizer


def rows_of(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_of_both_vocabularies_keeps_its_row_and_any_other_gets_the_mean_of_its_pieces(
    new_tokenizer: Any, tied: bool
) -> None:
    old = toy_tokenizer()
    model = tiny_model(tied=tied)
    student = change_tokenizer(model, old, new_tokenizer)
    old_id, new_id = old.convert_tokens_to_ids, new_tokenizer.convert_tokens_to_ids
    pieces = {
        "▁the": ["Ġthe"],
        "<0x0A>": ["Ċ"],
        "rain": ["rain"],
        "▁rain": ["Ġ", "rain"],
        "wet": ["w", "e", "t"],
        "é": ["Ã", "©"],
    }
    for before, after in zip(rows_of(model), rows_of(student), strict=True):
        assert len(after) == len(new_tokenizer)
        for token, spelled in pieces.items():
            expected = before[[old_id(piece) for piece in spelled]].mean(0)
            torch.testing.assert_close(
                after[new_id(token)], expected, rtol=0, atol=1e-7 if len(spelled) > 1 else 0
            )
    assert student.config.tie_word_embeddings == tied
    assert (rows_of(student)[0] is rows_of(student)[1]) == tied


def test_a_bias_of_the_head_is_transferred_like_its_rows(new_tokenizer: Any) -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    model = GPTJForCausalLM(
        GPTJConfig(
            vocab_size=272,
            n_embd=32,
            n_layer=1,
            n_head=4,
            rotary_dim=4,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    model.lm_head.bias.data.normal_()
    student = change_tokenizer(model, toy_tokenizer(), new_tokenizer)
    pieces = toy_tokenizer().convert_tokens_to_ids(["w", "e", "t"])
    expected = model.lm_head.bias[pieces].mean()
    torch.testing.assert_close(
        student.lm_head.bias[new_tokenizer.convert_tokens_to_ids("wet")], expected
    )


def test_special_tokens_start_from_old_tokens_of_the_same_role(new_tokenizer: Any) -> None:
    old = toy_tokenizer()
    sources = token_sources(old, new_tokenizer)
    assert sources[new_tokenizer.eos_token_id] == (old.eos_token_id,)
    assert sources[new_tokenizer.bos_token_id] == (old.bos_token_id,)
    assert all(len(ids) for ids in sources)


def test_the_turn_end_token_starts_from_the_old_turn_end_token() -> None:
    old = toy_tokenizer(added=("<turn|>", "</s>"))
    old.chat_template = "{% for m in messages %}{{ m['content'] + '<turn|>' }}{% endfor %}"
    sources = token_sources(old, new := sentencepiece_tokenizer())
    assert stop_tokens(old)[0] == old.convert_tokens_to_ids("<turn|>")
    assert sources[new.eos_token_id] == (old.convert_tokens_to_ids("<turn|>"),)


def test_a_special_token_of_the_same_name_keeps_its_row_and_one_without_a_match_is_spelled_out(
    new_tokenizer: Any,
) -> None:
    old = toy_tokenizer(added=("<tool>",))
    new_tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>", "[in]"]})
    sources = token_sources(old, new_tokenizer)
    assert sources[new_tokenizer.convert_tokens_to_ids("<tool>")] == (
        old.convert_tokens_to_ids("<tool>"),
    )
    assert sources[new_tokenizer.convert_tokens_to_ids("[in]")] == tuple(
        old.convert_tokens_to_ids(["[", "in", "]"])
    )


def test_relabelling_the_new_vocabulary_relabels_the_rows_and_changes_nothing_else(
    new_tokenizer: Any,
) -> None:
    model, old = tiny_model(), toy_tokenizer()
    with torch.no_grad():
        back = change_tokenizer(change_tokenizer(model, old, old), old, old)
    for before, after in zip(rows_of(model), rows_of(back), strict=True):
        assert torch.equal(before[: len(old)], after)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "mistral", "gpt2"])
def test_the_student_of_every_family_is_an_ordinary_folder_that_ends_its_turns(
    family: str, new_tokenizer: Any, tmp_path: Path
) -> None:
    student = change_tokenizer(tiny_model(family, layers=2), toy_tokenizer(), new_tokenizer)
    save_student(student, new_tokenizer, tmp_path, provenance={"tokenizer": "a test's"})
    refuse_misread(tmp_path, new_tokenizer)
    opened, tokenizer = load_model(tmp_path, device="cpu")
    assert opened.config.vocab_size == len(tokenizer) == len(new_tokenizer)
    assert (
        opened.config.eos_token_id
        == opened.generation_config.eos_token_id
        == tokenizer.eos_token_id
    )
    assert opened.config.bos_token_id == tokenizer.bos_token_id
    text = "the rain\n  é 雨 <0x0A>"
    assert tokenizer(text)["input_ids"] == new_tokenizer(text)["input_ids"]
    ids = tokenizer("the rain", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert opened.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3


def test_an_architecture_whose_folders_transformers_reads_with_its_own_tokenizer_is_refused(
    new_tokenizer: Any, tmp_path: Path
) -> None:
    student = change_tokenizer(tiny_model("qwen2", layers=2), toy_tokenizer(), new_tokenizer)
    save_student(student, new_tokenizer, tmp_path, provenance={})
    with pytest.raises(ModelError, match="Qwen2Tokenizer, which misreads the new tokenizer"):
        refuse_misread(tmp_path, new_tokenizer)


def test_settings_with_old_token_ids_are_removed_and_sampling_settings_kept(
    new_tokenizer: Any,
) -> None:
    model = tiny_model()
    model.generation_config.suppress_tokens = [3]
    model.generation_config.temperature = 0.3
    student = change_tokenizer(model, toy_tokenizer(), new_tokenizer)
    assert student.generation_config.suppress_tokens is None
    assert student.generation_config.temperature == 0.3


def test_a_tokenizer_that_never_ends_or_hides_its_bytes_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    endless = sentencepiece_tokenizer()
    endless.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        change_tokenizer(tiny_model(), toy_tokenizer(), endless)
    words = Tokenizer(models.WordPiece({"the": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(OpaqueTokenizer, match="WordPiece"):
        token_sources(
            toy_tokenizer(), PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[UNK]")
        )


@pytest.mark.slow
def test_a_real_model_with_another_real_vocabulary_still_predicts_its_language() -> None:
    folder = Path(__file__).parents[1] / ".cache" / "tokenizers" / "llama2"
    if not folder.is_dir():
        pytest.skip("no tokenizers on this disk: run `make tokenizers`")
    teacher, tokenizer = load_model("demo", dtype="bfloat16", device="cpu")
    new_tokenizer = load_tokenizer(folder)
    paragraphs = (
        (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n\n")
    )
    student = change_tokenizer(teacher, tokenizer, new_tokenizer)
    bits = []
    for model, reader in ((teacher, tokenizer), (student, new_tokenizer)):
        dataset, _ = tokenize_conversations(
            [{"text": text} for text in paragraphs if len(text) > 200], reader
        )
        bits.append(
            summarize(score_tokens(model, dataset, pad_token_id=reader.pad_token_id))[
                "bits_per_byte"
            ]
        )
    assert bits[0] < bits[1] < 1.6 * bits[0]
