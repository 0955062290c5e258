"""Give a model another tokenizer: every new token starts from the rows of the old tokens that spell the same bytes.

V old tokens, V' new ones, H hidden size. A row of the embedding (and of the head, tied or not) becomes

    row'(u) = mean of row(v) over v in seg(u)         seg(u): the old tokenizer's tokens for the bytes of new token u

so a token that both vocabularies have keeps its row bit for bit. Special tokens have no bytes; they start from the old token that
does their work (ends a turn, ends or begins a sequence, pads), else from the old special token of the same spelling, else from the
tokens of that spelling, which is what the teacher would read in its place.

Source: Gee et al. 2022, Fast Vocabulary Transfer for Language Model Compression (EMNLP industry track), arXiv 2402.09977, section
3; ours compares bytes, where the paper compares strings. It needs nothing but the two tokenizers. WECHSEL (Minixhofer et al. 2022,
arXiv 2112.06598) and FOCUS (Dobler and de Melo 2023, arXiv 2305.14481) need word vectors, zero-shot transfer (Minixhofer et al.
2024, arXiv 2405.07883) a network trained for the model; they pay where two vocabularies share little. Tried on SmolLM2-135M with
a vocabulary of Llama 2's kind, in bits a byte of held-out answers before any training: the teacher 0.34, the mean of the pieces
0.72, the last piece 0.88, the first piece 1.03, their sum 14.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.alignment import stop_tokens, token_bytes
from potstill.alignment.segmentation import Segmenter
from potstill.alignment.token_bytes import special_ids
from potstill.alignment.probe import PROBE
from potstill.errors import ModelError, VocabularyMismatch

ROLES = ("eos_token_id", "bos_token_id", "pad_token_id", "unk_token_id")
# Settings of a generation config that name tokens of the old vocabulary.
NAMING_TOKENS = (
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "force_words_ids",
    "sequence_bias",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "decoder_start_token_id",
)


def token_sources(tokenizer: Any, new_tokenizer: Any) -> list[tuple[int, ...]]:
    """For each id of ``new_tokenizer`` the ids of ``tokenizer`` it starts from; none for an id that no token has.

    Raises: OpaqueTokenizer if the bytes of either's tokens cannot be recovered; VocabularyMismatch if they share none.
    """
    segment = Segmenter(tokenizer, token_bytes(tokenizer))
    new_tokens = token_bytes(new_tokenizer)
    if segment.ids.keys().isdisjoint(filter(None, new_tokens)):
        raise VocabularyMismatch("the two tokenizers have no token in common, not one byte; choose another --tokenizer")
    sources = segment(new_tokens)
    old_specials, specials = sorted(special_ids(tokenizer)), sorted(special_ids(new_tokenizer))
    spellings = new_tokenizer.convert_ids_to_tokens(specials)
    same_spelling = dict(zip(tokenizer.convert_ids_to_tokens(old_specials), old_specials, strict=True))
    same_work = _same_work(tokenizer, new_tokenizer)
    spelled_out = segment(spelling.encode() for spelling in spellings)
    for new, spelling, pieces in zip(specials, spellings, spelled_out, strict=True):
        source = same_work.get(new, same_spelling.get(spelling))
        sources[new] = pieces if source is None else (source,)
    return sources


def change_tokenizer(model: Any, tokenizer: Any, new_tokenizer: Any, *, sources: list[tuple[int, ...]] | None = None) -> Any:
    """A new model like ``model`` that reads and writes the tokens of ``new_tokenizer``, in its dtype, on the cpu.

    ``tokenizer`` is the model's own; ``sources`` are `token_sources` of the two, where they are known. Both configurations
    name the new special tokens; a turn ends where the new chat template ends it. Raises: ModelError if the new tokenizer has no
    end-of-sequence token, or if the model keeps more of its vocabulary than an embedding and a head; OpaqueTokenizer and
    VocabularyMismatch as `token_sources`.
    """
    from transformers import AutoModelForCausalLM

    stops = stop_tokens(new_tokenizer)
    if not stops:
        raise ModelError("the new tokenizer has no end-of-sequence token, so its student could never stop; choose another")
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None):
        raise ModelError(
            f"{type(model).__name__}: each of its layers has an embedding of its own, which would stay the old tokens'"
        )
    sources = token_sources(tokenizer, new_tokenizer) if sources is None else sources
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config()):
        part.vocab_size = len(sources)
        _name_special_tokens(part, new_tokenizer)
    student = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    head = model.get_output_embeddings()
    tall = {id(model.get_input_embeddings().weight), *(id(parameter) for parameter in head.parameters(recurse=False))}
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in tall}
    state = {name: _mean_rows(tensor, sources) if name in names else tensor for name, tensor in model.state_dict().items()}
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-160:]
        raise ModelError(
            f"{type(model).__name__}: more than an embedding and a head depends on its vocabulary: {reason}"
        ) from error
    student.generation_config = copy.deepcopy(model.generation_config)
    _name_special_tokens(student.generation_config, new_tokenizer)
    student.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    for name in NAMING_TOKENS:
        if getattr(student.generation_config, name, None) is not None:
            setattr(student.generation_config, name, None)
    return student.eval()


def refuse_misread(folder: Path, tokenizer: Any) -> None:
    """Raises: ModelError if transformers opens the tokenizer saved in ``folder`` as another one.

    It does so without a word for some architectures (Qwen 2, Phi 3): it rebuilds the family's own tokenizer around whatever
    vocabulary it finds there, and a student would be asked questions in tokens that it never saw so split.
    """
    from transformers import AutoTokenizer

    reopened = AutoTokenizer.from_pretrained(folder)
    if reopened.encode(PROBE, add_special_tokens=False) != tokenizer.encode(PROBE, add_special_tokens=False):
        raise ModelError(
            f"transformers opens every folder of this architecture with {type(reopened).__name__}, which misreads the new "
            "tokenizer; take a teacher of another architecture (Llama, Qwen 3, Gemma), or leave out --tokenizer"
        )


def _same_work(tokenizer: Any, new_tokenizer: Any) -> dict[int, int]:
    """Which special token of the old tokenizer does the work of each of the new one's; ending a turn comes first."""
    same = {}
    for old, new in zip(stop_tokens(tokenizer)[:1], stop_tokens(new_tokenizer)[:1], strict=False):
        same[new] = old
    for role in ROLES:
        old, new = getattr(tokenizer, role), getattr(new_tokenizer, role)
        if old is not None and new is not None:
            same.setdefault(new, old)
    return same


def _mean_rows(weight: Tensor, sources: list[tuple[int, ...]]) -> Tensor:
    """``[V, …]`` → ``[V', …]``: the mean of each new token's source rows, and of all rows where it has none."""
    rows = weight.float().reshape(len(weight), -1)
    lengths = torch.tensor([len(ids) for ids in sources])
    flat = torch.tensor([i for ids in sources for i in ids], device=rows.device)
    offsets = (lengths.cumsum(0) - lengths).to(rows.device)
    means = torch.nn.functional.embedding_bag(flat, rows, offsets, mode="mean")
    means[lengths == 0] = rows.mean(0)
    return means.to(weight.dtype).reshape(len(sources), *weight.shape[1:])


def _name_special_tokens(config: Any, tokenizer: Any) -> None:
    """Put the tokenizer's special ids wherever ``config`` names any."""
    for role in ROLES:
        if hasattr(config, role):
            setattr(config, role, getattr(tokenizer, role))
