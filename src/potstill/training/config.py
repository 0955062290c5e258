"""`DistillationConfig`: transformers' TrainingArguments and what distillation adds to them."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from potstill.defaults import MAX_LENGTH, ROLLOUT_TOKENS
from potstill.errors import ConfigError
from potstill.losses import DIVERGENCES
from potstill.losses.fused import DivergenceFunction, resolve_divergence
from potstill.losses.records import all_parameters
from potstill.teachers import LossSettings
from potstill.training.cross_objective import ALIGNMENTS

METHODS = ("text", "logits", "cross")

# One field for each parameter of a divergence: jensen_shannon's teacher_weight, skew_*'s skew.
_DivergenceParameters = dataclasses.make_dataclass(
    "_DivergenceParameters",
    [
        (name, float, field(default=one.default, metadata={"help": one.help}))
        for name, one in all_parameters().items()
    ],
)


@dataclass
class DistillationConfig(_DivergenceParameters, TrainingArguments):  # type: ignore[misc, valid-type]
    """`transformers.TrainingArguments`, and what distillation adds to them.

    Raises: ConfigError for a value out of range or an unknown name.
    """

    method: str = field(
        default="logits",
        metadata={
            "help": "text: cross-entropy on the teacher's text. logits: a divergence. "
            "cross: a divergence across tokenizers."
        },
    )
    alignment: str = field(
        default="pieces", metadata={"help": f"cross: one of {', '.join(ALIGNMENTS)}."}
    )
    divergence: str | DivergenceFunction = field(
        default="forward_kl",
        metadata={"help": f"One of {', '.join(DIVERGENCES)}, or a function of two logits."},
    )
    divergence_parameters: dict[str, float] | None = field(
        default=None, metadata={"help": "Parameters by name: of a divergence of your own."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Divides both models' logits. No temperature² factor."}
    )
    hard_label_weight: float = field(
        default=0.0, metadata={"help": "Share of cross-entropy on the text, between 0 and 1."}
    )
    teacher_temperature: float = field(
        default=1.0, metadata={"help": "cross: the temperature at which the text was sampled."}
    )
    within_weight: float = field(
        default=1.0, metadata={"help": "cross: weight of the cross-entropy inside a cell."}
    )
    compile_loss: bool = field(
        default=False,
        metadata={"help": "logits: torch.compile the loss; for long runs on a GPU."},
    )
    max_length: int = field(
        default=MAX_LENGTH,
        metadata={"help": "Tokens at which a conversation is cut; cut ones are counted."},
    )
    packed: bool = field(
        default=True, metadata={"help": "Pack several conversations into one row of a batch."}
    )

    on_policy: float = field(
        default=0.0,
        metadata={"help": "Share of micro-batches that are the student's own answers, 0 to 1."},
    )
    on_policy_divergence: str | DivergenceFunction = field(
        default="reverse_kl", metadata={"help": "The divergence on the student's own answers."}
    )
    on_policy_from: float = field(
        default=0.0, metadata={"help": "Share of the run after which the student writes."}
    )
    rollout_size: int | None = field(
        default=None,
        metadata={"help": "Answers in a round on each device; 8 batches if not given."},
    )
    rollout_reuse: int = field(
        default=4, metadata={"help": "Passes over each round of the student's answers."}
    )
    rollout_tokens: int = field(
        default=ROLLOUT_TOKENS, metadata={"help": "Maximum number of tokens in such an answer."}
    )
    rollout_temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature of the student's answers."}
    )
    rollouts_dir: str | None = field(
        default=None, metadata={"help": "Folder of the answers; output_dir/rollouts by default."}
    )

    # The loss needs columns that the model's forward does not name.
    remove_unused_columns: bool = False
    # A loss that is not finite raises NonFiniteLoss.
    logging_nan_inf_filter: bool = False

    def __post_init__(self) -> None:
        # Without an accelerator TrainingArguments refuses bf16 unless use_cpu is set.
        if not torch.accelerator.is_available():
            self.use_cpu = True
        # All are used: the loss is computed in the forward. Looking for others costs time.
        if self.ddp_find_unused_parameters is None:  # type: ignore[has-type]
            self.ddp_find_unused_parameters = False
        super().__post_init__()
        self._gather_when_saved()
        for name, known in (("method", METHODS), ("alignment", ALIGNMENTS)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} {getattr(self, name)!r} is not known; use one of {', '.join(known)}"
                )
        for name in ("divergence", "on_policy_divergence"):
            chosen = getattr(self, name)
            if isinstance(chosen, str) and chosen not in DIVERGENCES:
                raise ConfigError(
                    f"{name} {chosen!r} is not known; use one of {', '.join(DIVERGENCES)}"
                )
        self._check_on_policy()
        for name in ("temperature", "teacher_temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"{name} {getattr(self, name)}: must be above 0; "
                    "1.0 takes the distributions as they are"
                )
        for name in all_parameters():
            if not 0 < self._parameters().get(name, 0.5) < 1:
                raise ConfigError(
                    f"{name} {self._parameters()[name]}: must lie between 0 and 1, ends excluded"
                )
        for name in ("hard_label_weight", "within_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} {getattr(self, name)}: a share, so between 0 and 1")
        resolve_divergence(self.divergence, self._parameters())

    def _gather_when_saved(self) -> None:
        """Let DeepSpeed's ZeRO 3 gather the student's weights when it is saved."""
        sharding = getattr(self, "hf_deepspeed_config", None)
        if sharding is not None and sharding.is_zero3():
            sharding.config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True

    def _check_on_policy(self) -> None:
        """Raises: ConfigError."""
        if not 0 <= self.on_policy <= 1:
            raise ConfigError(
                f"on_policy {self.on_policy}: a share, so between 0 (the data's answers alone) and "
                "1 (the student's alone)"
            )
        if not 0 <= self.on_policy_from < 1:
            raise ConfigError(
                f"on_policy_from {self.on_policy_from}: a share of the run, from 0 to below 1"
            )
        for name in ("rollout_size", "rollout_reuse", "rollout_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value}: must be at least 1")
        if self.rollout_size and self.rollout_size % self.per_device_train_batch_size:
            raise ConfigError(
                f"rollout_size {self.rollout_size}: must be a multiple of the batch size, "
                f"{self.per_device_train_batch_size}"
            )
        if not self.rollout_temperature >= 0:
            raise ConfigError(
                f"rollout_temperature {self.rollout_temperature}: must be 0 or above; "
                "0 takes the most likely token"
            )
        if self.on_policy and self.method == "text":
            raise ConfigError(
                f"on_policy {self.on_policy} with method text: no teacher corrects what the "
                "student writes; use --method logits or cross, or leave out --on-policy"
            )

    @property
    def on_policy_loss_settings(self) -> LossSettings:
        """The same on the student's own answers: no part of it takes the text as the teacher's."""
        own = copy.copy(self)
        own.divergence, own.hard_label_weight = self.on_policy_divergence, 0.0
        if self.on_policy_divergence != self.divergence and not isinstance(self.divergence, str):
            own.divergence_parameters = None  # those of a divergence of your own
        return dataclasses.replace(own.loss_settings, within_weight=0.0)

    @property
    def loss_settings(self) -> LossSettings:
        """What a target needs to know to compute the loss."""
        _, parameters = resolve_divergence(self.divergence, self._parameters())
        return LossSettings(
            divergence=self.divergence,
            divergence_parameters=parameters,
            temperature=self.temperature,
            hard_label_weight=self.hard_label_weight,
            teacher_temperature=self.teacher_temperature,
            within_weight=self.within_weight,
            compiled=self.compile_loss,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings for logs; a divergence of your own by its name."""
        settings: dict[str, Any] = super().to_dict()
        return settings | self._divergence_names()

    def __getstate__(self) -> dict[str, Any]:
        # The Trainer pickles its settings into each checkpoint, and a lambda cannot be pickled.
        return self.__dict__ | self._divergence_names()

    def _divergence_names(self) -> dict[str, str]:
        chosen = {name: getattr(self, name) for name in ("divergence", "on_policy_divergence")}
        return {
            name: one if isinstance(one, str) else getattr(one, "__name__", None) or str(one)
            for name, one in chosen.items()
        }

    def _parameters(self) -> dict[str, float]:
        given = dict(self.divergence_parameters or {})
        if not isinstance(self.divergence, str):
            return given
        named = {name: getattr(self, name) for name in all_parameters() if hasattr(self, name)}
        return named | given
