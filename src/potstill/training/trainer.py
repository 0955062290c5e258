"""`DistillationTrainer`: a `transformers.Trainer` whose loss is the divergence from a teacher.

Everything that the Trainer offers (resume, callbacks, loggers, accumulation, checkpointing, PEFT,
DDP, FSDP, the Hub) is unchanged; only `compute_loss` differs:

    student's hidden states  ┐
                             ├→  Σ over supervised tokens  →  ÷ supervised tokens of the whole step
    teacher's targets        ┘
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Trainer, TrainerCallback

from potstill.data.forms import as_conversation
from potstill.errors import ConfigError, NonFiniteLoss
from potstill.models.vocabulary import highest_id, refuse_unknown_ids
from potstill.processes import print_main
from potstill.protocols import Batch
from potstill.training.config import DistillationConfig
from potstill.training.objectives import Objective, make_objective
from potstill.training.on_policy import OBJECTIVE, OnPolicy
from potstill.training.prefetch import with_prefetching
from potstill.training.self_check import CONVERSATIONS, check_objective


class DistillationTrainer(Trainer):
    """Train ``model`` to match ``teacher``.

    ``teacher`` is a causal language model or any `Teacher`; None for method ``text``, which learns
    from the text alone. Data sets contain conversations (potstill.data) or tokenized rows. If the
    tokenizers share only their first ids, both heads are cut to them. ``teacher_tokenizer`` is
    found by the teacher's name if it is not given. An ``objective`` (`make_objective`) replaces
    both.

    Raises: VocabularyMismatch if teacher and student do not share their tokens; ModelError for data
    with a token id beyond a model's vocabulary; ConfigError if a teacher is missing; from `train`,
    SelfCheckFailed before the first step, and NonFiniteLoss before the optimizer step that would
    damage the student.
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
        self.objective = objective or make_objective(
            args, model, processing_class, teacher, teacher_tokenizer
        )
        train_dataset, eval_dataset = (
            _encoded(dataset, self.objective, args.max_length)
            for dataset in (train_dataset, eval_dataset)
        )
        _refuse_unknown_ids(model, self.objective, train_dataset, eval_dataset)
        args._n_gpu = min(args.n_gpu, 1)  # disable nn.DataParallel; use DDP or FSDP
        self.args = args
        self.on_policy = OnPolicy(self, model, train_dataset) if args.on_policy else None
        layout = kwargs.pop("data_collator", None) or self.objective.layout
        if not args.on_policy:  # else many announced batches would not be taken
            layout = with_prefetching(layout, self.objective, workers=args.dataloader_num_workers)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=layout,
            **kwargs,
        )
        if self.on_policy is not None:
            self.add_callback(_BeginOnPolicy(self.on_policy))
        self._check_parallelism()
        self.model_accepts_loss_kwargs = (
            True  # makes the Trainer count the step's supervised tokens
        )
        self.tokens_seen, self.seconds_evaluating = 0, 0.0
        self._checked = False
        self._evaluated = torch.zeros(2, dtype=torch.float64)

    def _check_parallelism(self) -> None:
        """Raises: ConfigError for FSDP 1 and for a teacher that processes share."""
        fsdp = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if fsdp is not None and getattr(fsdp, "fsdp_version", 2) == 1:
            found = "FSDP version 1 shards a head's weight outside of the model's forward"
            raise ConfigError(f"{found}; use fsdp_version 2")
        policy = getattr(fsdp, "mixed_precision_policy", None)
        if policy is not None and policy.reduce_dtype in (torch.bfloat16, torch.float16):
            # accelerate's default: a sum over processes in 8 bits of precision.
            full = dataclasses.replace(policy, reduce_dtype=torch.float32)
            fsdp.mixed_precision_policy = full  # type: ignore[union-attr]
        teacher = None if self.objective.teacher is None else self.objective.teacher.model
        parts = getattr(teacher, "_tp_size", None) or 1
        if parts > 1 and self.get_tp_size() != parts:
            raise ConfigError(
                f"the teacher is divided over {parts} processes (tensor parallel), which read "
                "different conversations, so that its targets would be wrong; open it with "
                "device_map, or use potstill serve"
            )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Batch], Any]:
        """Return the micro-batches of a step, and the number of their supervised tokens."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        if self.on_policy is None or not batches:
            return batches, count
        batches = self.on_policy.replaced(batches, self.state.global_step)
        return batches, self._get_num_items_in_batch(batches, self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the micro-batch's summed loss ÷ supervised tokens of the step, nats per token."""
        nats = self.summed_loss(model, inputs)
        tokens = (inputs["labels"][:, 1:] != -100).sum()
        if model.training and self.on_policy is not None:
            self.on_policy.note_loss(inputs, nats, tokens)
        if not model.training:
            self._evaluated += torch.stack([nats.detach().float(), tokens.float()]).cpu()
        loss = nats / (tokens if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP averages over processes, but the loss is already divided by all tokens.
            # Processes that share a batch (tensor parallel) count as one.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log like the Trainer; on-policy runs also log the loss of each kind of text."""
        if self.on_policy is not None and "loss" in logs:
            logs = {**logs, **self.on_policy.noted_losses()}
        super().log(logs, *args, **kwargs)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Extend mixed precision to the loss: accelerate wraps only the model's forward."""
        stack: contextlib.ExitStack = super().compute_loss_context_manager()
        stack.enter_context(self.accelerator.autocast())
        return stack

    def summed_loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        """Return Σ over the supervised tokens of ``inputs``, in nats."""
        columns: dict[str, Any] = dict(inputs)
        objective: Objective = columns.get(OBJECTIVE, self.objective)
        return objective.summed_loss(model, inputs)

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run one micro-batch. Raises: NonFiniteLoss; SelfCheckFailed before the first step."""
        if not self._checked and self.state.global_step == 0:
            self._self_check(model)
        lengths = inputs.get("lengths", inputs.get("attention_mask"))
        self.tokens_seen += int(inputs["input_ids"].numel() if lengths is None else lengths.sum())
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._check_finite(loss, "loss")
        return loss

    def tokens_seen_by_all(self) -> int:
        """Return the tokens seen by all processes. All must call it."""
        if self.accelerator.num_processes == 1:
            return self.tokens_seen
        seen = torch.tensor(self.tokens_seen, device=self.args.device)
        return int(self.accelerator.reduce(seen, "sum"))

    def _self_check(self, model: nn.Module) -> None:
        self._checked = True
        rows = list(itertools.islice(iter(self.train_dataset), CONVERSATIONS))
        with self.compute_loss_context_manager():
            layout, device = self.data_collator, self.args.device
            check_objective(self.objective, model, rows, layout=layout, device=device)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate like the Trainer, on conversations or tokenized rows."""
        if not isinstance(eval_dataset, str):
            eval_dataset = _encoded(eval_dataset, self.objective, self.args.max_length)
        found: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return found

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate like the Trainer; ``eval_loss`` is a mean over tokens, not over batches."""
        self._evaluated.zero_()
        begun = time.perf_counter()
        output = super().evaluation_loop(*args, **kwargs)
        self.seconds_evaluating += time.perf_counter() - begun
        unwrapped = self.model is self.model_wrapped
        if not self.is_in_train and self.accelerator.num_processes > 1 and unwrapped:
            # Prepared for evaluation, accelerate would later train the model without DDP.
            self.model._is_accelerate_prepared = False
        sums = self._evaluated.to(self.args.device, torch.float32)
        nats, tokens = self.accelerator.reduce(sums, "sum").tolist()
        output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = nats / max(tokens, 1)
        return output

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and self.accelerator.scaler is None:  # fp16's scaler skips such steps
            self._check_finite(torch.as_tensor(norm), "gradient")
        return norm

    def _check_finite(self, value: Tensor, name: str) -> None:
        if not torch.isfinite(value):
            raise NonFiniteLoss(
                f"the {name} became {value.item()} at step {self.state.global_step + 1}; the "
                "student was not updated, earlier checkpoints are good: lower --learning-rate, use "
                "bf16 instead of fp16, or check the data of that step"
            )


class _BeginOnPolicy(TrainerCallback):
    def __init__(self, on_policy: OnPolicy) -> None:
        self.on_policy = on_policy

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_policy.begin(state.global_step, state.max_steps)


def _refuse_unknown_ids(model: Any, objective: Objective, *datasets: Any) -> None:
    """Check that student and teacher have a row for each token id of the data."""
    teacher = None if objective.teacher is None else objective.teacher.model
    parts = (one.values() if isinstance(one, Mapping) else [one] for one in datasets)
    for dataset in itertools.chain.from_iterable(parts):
        read = highest_id(dataset, "input_ids")
        refuse_unknown_ids(model, read, role="student")
        if teacher is not None:
            read_by_teacher = highest_id(dataset, "teacher_input_ids")
            highest = read if read_by_teacher < 0 else read_by_teacher
            refuse_unknown_ids(teacher, highest, role="teacher")


def _encoded(dataset: Any, objective: Objective, max_length: int) -> Any:
    """Return ``dataset`` tokenized; of a dict of data sets, each."""
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
    """Check the columns, or the first row of a list or stream."""
    return "input_ids" in (getattr(dataset, "column_names", None) or next(iter(dataset), {}))
