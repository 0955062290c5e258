"""`DistillationTrainer`: a `transformers.Trainer` whose loss is the distance to a teacher.

N supervised tokens of a micro-batch. Everything the Trainer gives (resume, callbacks, loggers, accumulation, checkpointing, PEFT,
DDP, FSDP, the Hub) is left as it is; what differs is one method, `compute_loss`:

    student's hidden states  ┐
                             ├→  Σ over supervised tokens (losses/fused.py)  →  divided once, by the tokens of the whole step
    teacher's targets        ┘
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Trainer

from potstill.data.conversations import as_conversation
from potstill.errors import ConfigError, NonFiniteLoss
from potstill.processes import print_main
from potstill.training.config import DistillationConfig
from potstill.training.objectives import Objective, make_objective
from potstill.training.self_check import CONVERSATIONS, check_objective


class DistillationTrainer(Trainer):
    """Trains ``model`` towards ``teacher``.

    ``teacher`` is a causal language model, or any `Teacher`; None for method ``text``, which learns the text alone. Data sets
    hold conversations (potstill.data) or rows already tokenized. Where the two tokenizers share only their first rows, both
    heads are cut to these. ``teacher_tokenizer`` is found by the teacher's name if it is not given. An ``objective`` already made
    (`make_objective`) has a teacher and needs neither.

    Raises: VocabularyMismatch if teacher and student do not share their tokens; ConfigError if a teacher is missing; from `train`,
    SelfCheckFailed before the first step, and NonFiniteLoss before the optimizer step that would spoil the student.
    """

    args: DistillationConfig

    def __init__(
        self,
        model: Any,
        teacher: Any = None,
        args: DistillationConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        teacher_tokenizer: Any = None,
        objective: Objective | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or DistillationConfig()
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model.config.name_or_path)
        self.objective = objective or make_objective(args, model, processing_class, teacher, teacher_tokenizer)
        args._n_gpu = min(args.n_gpu, 1)  # several cards are DDP's or FSDP's business, never DataParallel's threads
        super().__init__(
            model=model,
            args=args,
            train_dataset=_encoded(train_dataset, self.objective, args.max_length),
            eval_dataset=_encoded(eval_dataset, self.objective, args.max_length),
            processing_class=processing_class,
            data_collator=kwargs.pop("data_collator", None) or self.objective.layout,
            **kwargs,
        )
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 2) == 1:
            raise ConfigError("FSDP version 1 shows a head's weight in shards outside of the model's forward; use fsdp_version 2")
        self.model_accepts_loss_kwargs = True  # so that the Trainer counts the supervised tokens of the whole step for us
        self.tokens_seen, self.seconds_evaluating = 0, 0.0
        self._checked = False
        self._evaluated = torch.zeros(2, dtype=torch.float64)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The sum over this micro-batch's supervised tokens, divided by those of the whole step, in nats a token."""
        nats = self.summed_loss(model, inputs)
        tokens = (inputs["labels"][:, 1:] != -100).sum()
        if not model.training:
            self._evaluated += torch.stack([nats.detach().float(), tokens.float()]).cpu()
        loss = nats / (tokens if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP averages over processes what was divided by the tokens of all; those that share a batch count as one.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, {}) if return_outputs else loss

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Mixed precision for the loss, too: accelerate wraps the model's forward alone, and our head comes after it."""
        stack: contextlib.ExitStack = super().compute_loss_context_manager()
        stack.enter_context(self.accelerator.autocast())
        return stack

    def summed_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Σ over the supervised tokens of ``inputs``, in nats: the loss before any division."""
        return self.objective.summed_loss(model, inputs)

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch. Raises: NonFiniteLoss before the optimizer could step on it; SelfCheckFailed at the very first."""
        if not self._checked and self.state.global_step == 0:
            self._self_check(model)
        mask = inputs.get("attention_mask")
        self.tokens_seen += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._refuse_non_finite(loss, "loss")
        return loss

    def tokens_seen_by_all(self) -> int:
        """Those of all processes together; each must ask."""
        if self.accelerator.num_processes == 1:
            return self.tokens_seen
        return int(self.accelerator.reduce(torch.tensor(self.tokens_seen, device=self.args.device), "sum"))

    def _self_check(self, model: nn.Module) -> None:
        self._checked = True
        rows = list(itertools.islice(iter(self.train_dataset), CONVERSATIONS))
        with self.compute_loss_context_manager():
            check_objective(self.objective, model, rows, layout=self.data_collator, device=self.args.device)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's own, of conversations as well as of rows already tokenized."""
        if not isinstance(eval_dataset, str):
            eval_dataset = _encoded(eval_dataset, self.objective, self.args.max_length)
        found: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return found

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, with ``eval_loss`` a mean over tokens instead of a mean of batch means."""
        self._evaluated.zero_()
        begun = time.perf_counter()
        output = super().evaluation_loop(*args, **kwargs)
        self.seconds_evaluating += time.perf_counter() - begun
        if not self.is_in_train and self.accelerator.num_processes > 1 and self.model is self.model_wrapped:
            # accelerate notes that it has prepared the model, for evaluation, and would train it later without DDP.
            self.model._is_accelerate_prepared = False
        nats, tokens = self.accelerator.reduce(self._evaluated.to(self.args.device, torch.float32), "sum").tolist()
        output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = nats / max(tokens, 1)
        return output

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and self.accelerator.scaler is None:  # fp16's scaler skips such steps by itself
            self._refuse_non_finite(torch.as_tensor(norm), "gradient")
        return norm

    def _refuse_non_finite(self, value: Tensor, name: str) -> None:
        if not torch.isfinite(value):
            raise NonFiniteLoss(
                f"the {name} became {value.item()} at step {self.state.global_step + 1}; the student was not updated and earlier "
                "checkpoints are good: try a lower --learning-rate, bf16 instead of fp16, or look at the data of that step"
            )


def _encoded(dataset: Any, objective: Objective, max_length: int) -> Any:
    """``dataset`` if it is tokenized (or absent), otherwise its conversations encoded; of several by name, each."""
    if isinstance(dataset, Mapping):
        return {name: _encoded(one, objective, max_length) for name, one in dataset.items()}
    if isinstance(dataset, Iterator):
        dataset = list(dataset)
    if dataset is None or _is_tokenized(dataset):
        return dataset
    rows = (as_conversation(row, f"row {number}") for number, row in enumerate(dataset, 1))
    encoded, counts = objective.encode(rows, max_length=max_length)
    print_main(f"data: {counts}")
    return encoded


def _is_tokenized(dataset: Any) -> bool:
    """By its columns, or where it does not know them (a list, a stream) by its first row."""
    return "input_ids" in (getattr(dataset, "column_names", None) or next(iter(dataset), {}))
