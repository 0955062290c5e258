"""The settings with which every model of a run is opened, in one value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from potstill.models.chat_template import as_date, set_chat_template, set_template_date
from potstill.models.quantized import check_kind
from potstill.models.sources import (
    Source,
    dtype_of,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
    pick_device,
)
from potstill.protocols import CausalLM, Tokenizer


class OpeningSettings(Protocol):
    """The settings of a command that opens models."""

    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def trust_remote_code(self) -> bool: ...
    @property
    def template_date(self) -> str | None: ...


class TeacherSettings(OpeningSettings, Protocol):
    """The settings of a command that opens a teacher."""

    @property
    def quantize_teacher(self) -> str | None: ...


@dataclass(frozen=True)
class ModelOpener:
    """Open models, tokenizers and configurations with the same device, dtype, template and trust.

    Every method raises what `load_model` raises; `tokenizer` also ChatTemplateError.
    """

    device: str = "auto"
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto (as saved)."""
    chat_template: str | None = None
    """The path of a Jinja file, or ``plain`` for tokenizers that have none."""
    trust_remote_code: bool = False
    template_date: str | None = None
    """The date that chat templates write, as YYYY-MM-DD; None is the current date."""
    quantize: str | None = None
    """8bit or 4bit: quantize a teacher while it is opened."""
    attention: str | None = None
    """The attention implementation, as transformers names it; None is its default."""

    @classmethod
    def of(cls, settings: OpeningSettings) -> ModelOpener:
        """Return the opener for a command's settings. Raises: ConfigError for the precision."""
        return cls(
            device=settings.device,
            dtype=dtype_of(settings.precision),
            chat_template=settings.chat_template,
            trust_remote_code=settings.trust_remote_code,
            template_date=settings.template_date,
        )

    @classmethod
    def of_teacher(cls, settings: TeacherSettings) -> ModelOpener:
        """Return the opener for the teacher. Raises: ConfigError as `of`, or for a quantization."""
        check_kind(settings.quantize_teacher)
        return replace(cls.of(settings), quantize=settings.quantize_teacher)

    def model(self, source: Source, *, dtype: str | None = None) -> CausalLM:
        """Open a causal language model in evaluation mode; ``dtype`` overrides the opener's."""
        return self.model_and_tokenizer(source, dtype=dtype)[0]

    def model_and_tokenizer(
        self,
        source: Source,
        *,
        dtype: str | None = None,
        max_memory: dict[Any, int] | None = None,
    ) -> tuple[CausalLM, Tokenizer]:
        """Open a model and its tokenizer; ``max_memory`` as in `load_model`."""
        model, tokenizer = load_model(
            source,
            dtype=dtype or self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            quantize=self.quantize,
            attention=self.attention,
            max_memory=max_memory,
        )
        return model, self._with_template(tokenizer)

    def tokenizer(self, source: Source) -> Tokenizer:
        """Open the tokenizer alone."""
        return self._with_template(load_tokenizer(source, trust_remote_code=self.trust_remote_code))

    def config(self, source: Source) -> Any:
        """Open the configuration alone."""
        return load_config(source, trust_remote_code=self.trust_remote_code)

    def generation_config(self, source: Source) -> Any:
        """Open the generation settings alone."""
        return load_generation_config(source, trust_remote_code=self.trust_remote_code)

    def device_type(self) -> str:
        """Return ``cpu``, ``cuda`` or ``mps``: where models are put."""
        return pick_device(self.device).type

    def _with_template(self, tokenizer: Tokenizer) -> Tokenizer:
        set_chat_template(tokenizer, self.chat_template)
        set_template_date(tokenizer, as_date(self.template_date))
        return tokenizer
