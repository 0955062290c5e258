from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.toys import sentencepiece, unigram
from conftest import toy_tokenizer
from potstill.alignment import special_ids, stop_tokens, token_bytes
from potstill.errors import OpaqueTokenizer

BYTE_LEVEL, SENTENCEPIECE = toy_tokenizer(), sentencepiece()
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁"), max_size=40)
SPECIAL = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")


def joined(tokenizer: Any, text: str) -> bytes:
    tokens = token_bytes(tokenizer)
    return b"".join(tokens[i] or b"?" for i in tokenizer.encode(text, add_special_tokens=False))


@given(TEXT)
def test_the_bytes_of_a_texts_ids_joined_are_the_texts_bytes(text: str) -> None:
    assert joined(BYTE_LEVEL, text) == text.encode()
    assert joined(SENTENCEPIECE, text) in (text.encode(), b" " + text.encode())


def test_every_byte_has_a_token_in_both_alphabets() -> None:
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):
        assert {bytes([byte]) for byte in range(256)} <= set(token_bytes(tokenizer))


def test_a_byte_token_is_one_byte_and_its_spelling_in_a_text_is_six() -> None:
    tokens = token_bytes(SENTENCEPIECE)
    assert tokens[SENTENCEPIECE.convert_tokens_to_ids("<0x0A>")] == b"\n"
    assert joined(SENTENCEPIECE, "x\n<0x0A>") == b" x\n<0x0A>"
    assert joined(BYTE_LEVEL, "x\n<0x0A>") == b"x\n<0x0A>"


def test_special_tokens_and_ids_without_a_token_have_no_bytes() -> None:
    tokens = token_bytes(BYTE_LEVEL)
    assert tokens[-2:] == [None, None]
    assert len(tokens) == len(BYTE_LEVEL)
    assert [token_bytes(SENTENCEPIECE)[i] for i in range(3)] == [None] * 3


def test_a_token_added_as_special_without_a_role_is_special(tokenizer: Any) -> None:
    assert special_ids(toy_tokenizer(added=("<|tool|>",))) == {*special_ids(tokenizer), 266}


def test_an_added_token_that_is_not_special_is_text() -> None:
    tokenizer = sentencepiece(literal=("▁▁▁▁", "<tag>"))
    assert token_bytes(tokenizer)[-2:] == [b"    ", b"<tag>"]
    byte_level = toy_tokenizer()
    byte_level.add_tokens(["é  "])
    assert token_bytes(byte_level)[-1] == "é  ".encode()
    assert joined(byte_level, "xé  y") == "xé  y".encode()


def test_a_unigram_tokenizer_uses_the_sentencepiece_alphabet() -> None:
    assert token_bytes(unigram())[1:3] == [b" ", b" the"]


def test_tiktokens_ranks_are_bytes_already() -> None:
    class Tiktoken:
        mergeable_ranks = {b"a": 0, b"\xff": 2}
        all_special_ids = [3]

        def __len__(self) -> int:
            return 4

    assert token_bytes(Tiktoken()) == [b"a", None, b"\xff", None]


def refusal(**settings: Any) -> str:
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(settings.get("model") or models.BPE(vocab={"a": 0}, merges=[]))
    if settings.get("lower"):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase()])
    tokenizer.decoder = settings.get("decoder") or decoders.ByteLevel()
    with pytest.raises(OpaqueTokenizer) as caught:
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    return str(caught.value)


def test_tokenizers_whose_bytes_cannot_be_recovered_are_refused_in_one_line() -> None:
    from tokenizers import decoders, models

    assert "WordPiece does not keep the spaces" in refusal(
        model=models.WordPiece({"a": 0}, unk_token="a")
    )
    assert "its normalizer changes the text (Lowercase)" in refusal(lower=True)
    clip = models.BPE(vocab={"a": 0, "a</w>": 1}, merges=[], end_of_word_suffix="</w>")
    assert "marks word ends" in refusal(model=clip)
    assert "decoder (Fuse) is not supported" in refusal(decoder=decoders.Fuse())
    assert "\n" not in refusal(lower=True)
    with pytest.raises(OpaqueTokenizer, match="unknown format"):
        token_bytes(SimpleNamespace(name_or_path="x", all_special_ids=[]))


def test_stop_tokens_are_the_templates_end_of_turn_and_the_eos_token() -> None:
    tokenizer = toy_tokenizer(added=("<|turn|>",))
    assert stop_tokens(tokenizer) == [265]
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|turn|>")
    assert stop_tokens(tokenizer) == [266, 265]
    assert stop_tokens(sentencepiece()) == [2]
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert stop_tokens(tokenizer) == [265]
