"""Declare the types that all packages share: a tokenizer, a causal language model and a batch.

Any object that has a protocol's members will do; nothing here is checked at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self, TypedDict

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    import torch
    from torch import Tensor, nn


class Tokenizer(Protocol):
    """A tokenizer of transformers, fast or slow."""

    name_or_path: str
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    all_special_ids: list[int]

    def __len__(self) -> int: ...

    def __call__(self, text: str | list[str], **settings: Any) -> Any: ...

    def encode(self, text: str, **settings: Any) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], **settings: Any) -> str: ...

    def convert_ids_to_tokens(self, ids: int | list[int]) -> Any: ...

    def get_vocab(self) -> dict[str, int]: ...

    def apply_chat_template(
        self, conversation: Sequence[dict[str, Any]], **settings: Any
    ) -> Any: ...

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> object: ...


class CausalLM(Protocol):
    """A causal language model of transformers."""

    config: Any
    generation_config: Any
    training: bool
    name_or_path: str

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, *inputs: Any, **settings: Any) -> Any: ...

    def get_output_embeddings(self) -> Any: ...

    def get_input_embeddings(self) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(
        self, *, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def get_submodule(self, target: str) -> nn.Module: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def num_parameters(self) -> int: ...

    def eval(self) -> Self: ...

    def train(self, mode: bool = True) -> Self: ...

    def float(self) -> Self: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], **settings: Any
    ) -> object: ...


class Batch(TypedDict, total=False):
    """The columns of a batch, ``[B, T]`` each; T is the same for all columns of one model.

    A pair layout adds the columns of `potstill.alignment.Positions`, and ``teacher_…`` columns for
    the teacher's tokenization of the same conversations.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    """Present only if the batch is not packed, and its models need it."""
    lengths: Tensor
    """``[B]``: tokens of each row without its padding. Present only if the batch is not packed."""
    cu_seq_lens: Tensor
    """``[S + 1]``, int32: where each of S conversations of one line begins, and the end."""
    longest: int
    """Tokens of the longest of them."""
    teacher_index: Tensor
    start: Tensor
    stop: Tensor
    depth: Tensor
    cell: Tensor
    chunk: Tensor
    conversation: Tensor
    teacher_input_ids: Tensor
    teacher_labels: Tensor
    teacher_position_ids: Tensor
    teacher_attention_mask: Tensor
    teacher_lengths: Tensor
    teacher_cu_seq_lens: Tensor
    teacher_longest: int
    teacher_number: Tensor
    teacher_chunk: Tensor
    teacher_conversation: Tensor
