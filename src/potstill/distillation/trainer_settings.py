"""Settings of transformers.TrainingArguments that a run accepts under ``trainer``.

Every setting works as transformers says, or is refused: a setting that a run overrides or ignores
would be a silent error.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from typing import Any

import transformers
from transformers.integrations import get_available_reporting_integrations

from potstill.errors import ConfigError
from potstill.training import DistillationConfig

SET_BY_FLAGS = {
    **{
        name: f"--{name.replace('_', '-')}"
        for name in (
            "output_dir",
            "method",
            "alignment",
            "divergence",
            "temperature",
            "teacher_temperature",
            "within_weight",
            "hard_label_weight",
            "max_length",
            "max_steps",
            "learning_rate",
            "gradient_accumulation_steps",
            "seed",
            "eval_steps",
            "on_policy",
            "on_policy_divergence",
            "on_policy_from",
            "rollout_size",
            "rollout_reuse",
            "rollout_tokens",
            "rollout_temperature",
        )
    },
    "rollouts_dir": "--output-dir",
    "divergence_parameters": "divergence_parameters",
    "num_train_epochs": "--max-steps or --seconds",
    "per_device_train_batch_size": "--batch-size",
    "bf16": "--precision bf16",
    "fp16": "--precision fp16",
    "use_cpu": "--device cpu",
    "eval_strategy": "eval_steps",
    "report_to": "--log-to",
}
"""Settings that a run takes from its own flags."""

_LOSS_ALONE = "evaluation during training gives the loss alone"
REFUSED = {
    "label_smoothing_factor": "the loss of a run has no label smoothing",
    "average_tokens_across_devices": "a run always averages over the tokens of all devices",
    "auto_find_batch_size": "another batch size would be another run",
    "ignore_data_skip": "a continued run would see other data",
    "save_only_model": "a run could not continue without its optimizer's state",
    "resume_from_checkpoint": "the same command continues a run",
    "remove_unused_columns": "the loss needs all columns",
    "label_names": "the loss needs all columns",
    "bf16_full_eval": "it would convert the student's weights",
    "fp16_full_eval": "it would convert the student's weights",
    "use_liger_kernel": "the loss is fused already, and Liger's would replace it",
    "liger_kernel_config": "the loss is fused already, and Liger's would replace it",
    "use_cache": "training never uses a cache",
    "prediction_loss_only": _LOSS_ALONE,
    "eval_do_concat_batches": _LOSS_ALONE,
    "eval_use_gather_object": _LOSS_ALONE,
    "eval_accumulation_steps": _LOSS_ALONE,
    "include_for_metrics": _LOSS_ALONE,
    "batch_eval_metrics": _LOSS_ALONE,
    "do_train": "a run always trains, and evaluates before and after",
    "do_eval": "a run always trains, and evaluates before and after",
    "do_predict": "a run always trains, and evaluates before and after",
    "local_rank": "torchrun and accelerate set it",
    "length_column_name": "a run has no column of lengths",
}
"""Settings that would have no effect or a wrong one, and the reason."""


def checked_trainer_settings(chosen: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the settings under ``trainer``. Raises: ConfigError naming a refused one."""
    known = {item.name for item in dataclasses.fields(DistillationConfig)}
    for name, value in chosen.items():
        if name in SET_BY_FLAGS:
            raise ConfigError(f"trainer.{name}: give {SET_BY_FLAGS[name]} instead")
        if name in REFUSED:
            raise ConfigError(f"trainer.{name}: {REFUSED[name]}; leave it out")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "check its name"
            raise ConfigError(
                f"trainer.{name}: no setting of transformers.TrainingArguments; {hint}"
            )
        if name == "train_sampling_strategy" and value == "group_by_length":
            raise ConfigError(
                f"trainer.{name} {value}: a run has no column of lengths; leave it out"
            )
    return copy.deepcopy(chosen)  # transformers changes nested settings, such as fsdp_config


def loggers(log_to: str | None) -> list[str]:
    """Return the names in a list separated by commas. Raises: ConfigError for one not there."""
    names = [name.strip() for name in (log_to or "").split(",") if name.strip()]
    available = get_available_reporting_integrations()
    for name in names:
        if name not in available:
            there = ", ".join(sorted(available)) or "none"
            raise ConfigError(
                f"--log-to {name}: not installed, or not known to transformers (there are: "
                f"{there}); install it, or leave it out"
            )
    return names


def make_arguments(settings: dict[str, Any], given: dict[str, Any]) -> DistillationConfig:
    """Return the trainer's arguments; ``given`` are the user's, for the message.

    Raises: ConfigError for a value that transformers refuses, or an optimizer that is not there.
    """
    try:
        arguments = DistillationConfig(**settings)
        transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (TypeError, ValueError, ImportError, RuntimeError) as error:  # in YAML no is False
        reason = " ".join(str(error).split())[:300]
        names = ", ".join(given) or "the settings"
        raise ConfigError(f"trainer: transformers says: {reason}; check {names}") from error
    return arguments
