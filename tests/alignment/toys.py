"""Toy tokenizers of three kinds, small enough to enumerate all texts."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from potstill.alignment import VocabularyCells

LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)


def letters(alphabet: str, *merges: str, words: bool = False, shift: int = 0) -> Any:
    """Return byte-level BPE; ``words`` splits before every "-", ``shift`` rotates the ids."""
    vocabulary = [*alphabet, *(merge.replace(" ", "") for merge in merges)]
    vocabulary = vocabulary[shift:] + vocabulary[:shift]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocabulary)},
            merges=[tuple(m.split()) for m in merges],
        )
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex("-[^-]*"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, byte_level] if words else [byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", additional_special_tokens=["<other>"]
    )


def sentencepiece(*merges: str, prepend: str = "always", literal: tuple[str, ...] = ()) -> Any:
    """Return SentencePiece-style BPE: "▁" for a space, a dummy prefix, byte fallback."""
    merges = merges or ("▁ t", "h e", "▁t he", "i n", "▁ ▁")
    characters = sorted(
        {character for merge in merges for character in merge if character != " "} | set("<0xA>")
    )
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split()) for merge in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme=prepend, split=False
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in literal])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = LLAMA_2
    return fast


def unigram() -> Any:
    """Return a Unigram tokenizer without byte fallback."""
    pieces = [
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("▁the", -3.0),
        ("t", -5.0),
        ("h", -5.0),
        ("e", -5.0),
        ("é", -6.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def by_range(cells: VocabularyCells, q: Tensor, emitted: tuple[int, ...]) -> Tensor:
    """Return the target by the fast path: a sum over one range of ``order``."""
    start, stop = cells.prefix_range(emitted)
    mass = q.new_zeros(cells.count)
    places = torch.arange(start, stop)
    mass.index_add_(0, cells.next_cells(places, len(emitted)), q[cells.order[places]])
    return mass / mass.sum()
