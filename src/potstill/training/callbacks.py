"""Trainer callbacks: a metrics file that survives interrupts, and a progress bar with the loss."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from potstill.run_folder import read_rows, write_whole

if TYPE_CHECKING:
    from potstill.training.trainer import DistillationTrainer


class MetricsFile(TrainerCallback):
    """Writes what the trainer logs to a JSON Lines file: loss, learning rate, and tokens and seconds of training so far.

    A resumed run goes on behind the row of its checkpoint: rows that an interrupt orphaned are taken out.
    """

    def __init__(self, file: Path, trainer: DistillationTrainer) -> None:
        self.file, self.trainer = file, trainer
        self.earlier = {"tokens": 0, "seconds": 0.0}
        self.begun = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take out the rows behind the step at which training begins."""
        rows = [row for row in read_rows(self.file)[0] if row.get("step", math.inf) <= state.global_step]
        if state.is_world_process_zero:
            write_whole(self.file, "".join(json.dumps(row) + "\n" for row in rows))
        self.earlier = rows[-1] if rows else self.earlier
        self.begun, self.trainer.seconds_evaluating = time.perf_counter(), 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Add one row."""
        if logs is None or not {"loss", "eval_loss"} & logs.keys():
            return
        seconds, seen = time.perf_counter() - self.begun - self.trainer.seconds_evaluating, self.trainer.tokens_seen_by_all()
        if not state.is_world_process_zero:
            return
        row = {
            "step": state.global_step,
            **{name: value for name, value in logs.items() if isinstance(value, int | float)},
        }
        row["tokens"] = self.earlier["tokens"] + seen
        row["seconds"] = round(self.earlier["seconds"] + seconds, 3)
        row["tokens_per_second"] = round(seen / seconds, 1)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class ProgressBar(ProgressCallback):
    """transformers' bar with the loss at its end, and not a line for every step: those are rows of the file above."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Show the loss."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}")
