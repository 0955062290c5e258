"""What the library needs of a tokenizer and of a model, as typing protocols.

Any object that has these members will do; nothing here is checked at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Tokenizer(Protocol):
    """A tokenizer of transformers, fast or slow."""

    name_or_path: str
    chat_template: Any
    bos_token: Any
    eos_token: Any
    pad_token: Any
    bos_token_id: Any
    eos_token_id: Any
    pad_token_id: Any

    def __len__(self) -> int: ...

    def __call__(self, text: Any, **settings: Any) -> Any: ...

    def encode(self, text: str, **settings: Any) -> list[int]: ...

    def decode(self, token_ids: Any, **settings: Any) -> str: ...

    def convert_ids_to_tokens(self, ids: Any) -> Any: ...

    def get_vocab(self) -> dict[str, int]: ...

    def apply_chat_template(self, conversation: Any, **settings: Any) -> Any: ...

    def save_pretrained(self, save_directory: Any) -> Any: ...


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

    def parameters(self) -> Any: ...

    def named_parameters(self, *, remove_duplicate: bool = True) -> Any: ...

    def named_modules(self) -> Any: ...

    def get_submodule(self, target: str) -> nn.Module: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def num_parameters(self) -> int: ...

    def eval(self) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def float(self) -> Any: ...

    def requires_grad_(self, requires_grad: bool = True) -> Any: ...

    def save_pretrained(self, save_directory: Any, **settings: Any) -> Any: ...
