"""Measure abilities with lm-evaluation-harness: its tasks, and files of questions (questions.py).

The harness's tasks use its own prompts, so that published figures can be compared. Questions of a
file are asked in the chat template of a model that has one.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import logging
import math
from typing import Any, Literal

from potstill.errors import ConfigError, DataError
from potstill.evaluation.questions import read_questions, task_config

Measures = dict[str, Any]
BATCH = 8


class Tasks:
    """Open ``names``, separated by commas: tasks of the harness, and ``.jsonl`` files.

    Raises: ConfigError if the harness is not installed or has no such task; DataError for data
    that cannot be loaded or a malformed question.
    """

    def __init__(self, names: str | None) -> None:
        wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
        self.files = [name for name in wanted if name.endswith(".jsonl")]
        for name in self.files:
            read_questions(name)
        if wanted and importlib.util.find_spec("lm_eval") is None:
            raise ConfigError("--tasks needs the package lm-eval: pip install 'potstill[lm-eval]'")
        named = [name for name in wanted if not name.endswith(".jsonl")]
        self.named = [task for name in named for task in _open(name)]

    def measure(self, model: Any, tokenizer: Any) -> dict[str, Measures]:
        """Return ``{TASK: {"questions": count, METRIC: value, "stderr": {METRIC: standard error},
        "lower_is_better": [METRIC]}}``."""
        if not self.files and not self.named:
            return {}
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        opened = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=BATCH, enable_thinking=False
        )
        chat = bool(tokenizer.chat_template)
        manager = TaskManager(include_defaults=False)  # all tasks are already open
        questions = [task_config(name, chat=chat) for name in self.files]
        measured: dict[str, Measures] = {}
        for tasks, in_chat in ((self.named, False), (questions, chat)):
            if tasks:
                found = simple_evaluate(
                    opened,
                    tasks=tasks,
                    task_manager=manager,
                    apply_chat_template=in_chat,
                    log_samples=False,
                )
                higher = found.get("higher_is_better", {})
                for name, results in found["results"].items():
                    measured[name] = _metrics(results, higher.get(name, {}))
        return measured


def better(measured: Measures, metric: str) -> Literal["lower", "higher"]:
    """Return which direction of a metric is better; ``higher`` for runs without that note."""
    return "lower" if metric in measured.get("lower_is_better", []) else "higher"


def interval(value: float, error: float | None) -> list[float]:
    """Return a metric's 95 % interval from its standard error; empty without one."""
    return [] if error is None else [value - 1.96 * error, value + 1.96 * error]


@functools.cache
def _manager() -> Any:
    """Return the harness's tasks. Reading their definitions takes seconds."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _open(name: str) -> list[Any]:
    """Return the task of that name; a group as one, to measure its mean as well."""
    known = _manager().all_tasks
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        found = f"not a .jsonl file, nor a task of lm-eval's{hint}"
        raise ConfigError(f"--tasks {name}: {found}; `lm-eval ls tasks` shows all")
    try:
        loaded = _manager().load([name])
    except Exception as error:  # a task runs its own code to get its data
        found = f"its data cannot be loaded ({' '.join(str(error).split())[:200]})"
        need = "use a machine that reaches the hub, or leave it out"
        raise DataError(f"--tasks {name}: {found}; {need}") from error
    return [loaded["groups"][name]] if name in loaded["groups"] else [*loaded["tasks"].values()]


def _finite(value: Any) -> float | None:
    """Return a number; None for ``N/A``, NaN and infinity (the perplexity of a random model)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _metrics(results: dict[str, Any], higher_is_better: dict[str, bool | None]) -> Measures:
    """Return the metrics of ``{"acc,none": …, "acc_stderr,none": …}``, without the filter none.

    None is a metric or an error that is not finite.
    """
    measured: Measures = {"questions": results.get("sample_len")}
    errors: dict[str, float | None] = {}
    lower = []
    for name, value in results.items():
        if "," not in name or "_stderr," in name:
            continue
        metric = name.removesuffix(",none")
        measured[metric] = _finite(value)
        errors[metric] = _finite(results.get("_stderr,".join(name.rsplit(",", 1))))
        if higher_is_better.get(name.split(",")[0]) is False:
            lower.append(metric)
    return {**measured, "stderr": errors, "lower_is_better": lower}
