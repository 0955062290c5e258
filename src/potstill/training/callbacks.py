"""Trainer callbacks: a metrics file that survives interruptions, and a progress line."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from potstill.progress import Progress
from potstill.run_folder import read_rows, write_whole

if TYPE_CHECKING:
    from potstill.training.trainer import DistillationTrainer

ROUND = "rollout_tokens"
"""In the rows that describe a round of rollouts."""
Logs = dict[str, Any] | None


class MetricsFile(TrainerCallback):
    """Write the trainer's logs to a JSON Lines file, with tokens and seconds of training so far.

    A resumed run continues after its checkpoint's row; later rows are deleted.
    """

    def __init__(self, file: Path, trainer: DistillationTrainer) -> None:
        self.file, self.trainer = file, trainer
        self.earlier = {"tokens": 0, "seconds": 0.0}
        self.begun = time.perf_counter()
        self.tokens_per_second = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Delete the rows after the step at which training begins."""
        step, rows = state.global_step, read_rows(self.file)[0]
        # A round of rollouts at the checkpoint's step was made after the checkpoint.
        rows = [row for row in rows if row.get("step", math.inf) + (ROUND in row) <= step]
        if state.is_world_process_zero:
            write_whole(self.file, "".join(json.dumps(row) + "\n" for row in rows))
        self.earlier = rows[-1] if rows else self.earlier
        self.begun, self.trainer.seconds_evaluating = time.perf_counter(), 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: Logs = None, **_: Any) -> None:
        """Add one row."""
        if logs is None or not {"loss", "eval_loss", ROUND} & logs.keys():
            return
        seconds = time.perf_counter() - self.begun - self.trainer.seconds_evaluating
        seen = self.trainer.tokens_seen_by_all()
        if not state.is_world_process_zero:
            return
        numbers = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        # fp16 skips steps whose gradient norm is not finite; JSON cannot hold the norm.
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        row = {"step": state.global_step, **finite}
        row["tokens"] = self.earlier["tokens"] + seen
        row["seconds"] = round(self.earlier["seconds"] + seconds, 3)
        row["tokens_per_second"] = self.tokens_per_second = round(seen / seconds, 1)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


class TrainingProgress(TrainerCallback):
    """Count steps on a progress line, with loss and tokens per second after ``metrics``."""

    def __init__(self, progress: Progress, metrics: MetricsFile) -> None:
        self.progress, self.metrics = progress, metrics

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the step."""
        self.progress.update(state.global_step - self.progress.done)

    def on_log(self, args: Any, state: Any, control: Any, logs: Logs = None, **_: Any) -> None:
        """Show the loss of the step."""
        if logs and "loss" in logs:
            speed = f"{self.metrics.tokens_per_second:.0f} tokens/s"
            self.progress.update(0, note=f"loss {logs['loss']:.3f}, {speed}")
