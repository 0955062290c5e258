"""What a model can do, by lm-evaluation-harness: its own tasks, and files of questions (questions.py).

Its tasks are asked as it asks them by itself, so that figures can be laid beside those of others. Questions of a file are asked as
a user's, in the chat template of a model that has one.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import logging
from typing import Any, Literal

from potstill.errors import ConfigError, DataError
from potstill.evaluation.questions import read_questions, task_config

Measures = dict[str, Any]
BATCH = 8


class Tasks:
    """``names``, separated by commas: tasks of the harness, opened now with their data, and ``.jsonl`` files, read now.

    Raises: ConfigError if the harness is not installed or does not know a name; DataError for data that cannot be had, or for a row
    that is no question, named by its file and line.
    """

    def __init__(self, names: str | None) -> None:
        wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
        self.files = [name for name in wanted if name.endswith(".jsonl")]
        for name in self.files:
            read_questions(name)
        if wanted and importlib.util.find_spec("lm_eval") is None:
            raise ConfigError("--tasks needs the package lm-eval: pip install 'potstill[lm-eval]'")
        self.named = [task for name in wanted if not name.endswith(".jsonl") for task in _open(name)]

    def measure(self, model: Any, tokenizer: Any) -> dict[str, Measures]:
        """For each task ``{"questions": how many, METRIC: value, …, "stderr": {METRIC: its standard error, …},
        "lower_is_better": [METRIC, …]}``."""
        if not self.files and not self.named:
            return {}
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        opened = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, enable_thinking=False)
        chat = bool(tokenizer.chat_template)
        manager = TaskManager(include_defaults=False)  # all tasks are opened, or spelled out
        questions = [task_config(name, chat=chat) for name in self.files]
        measured: dict[str, Measures] = {}
        for tasks, in_chat in ((self.named, False), (questions, chat)):
            if tasks:
                found = simple_evaluate(opened, tasks=tasks, task_manager=manager, apply_chat_template=in_chat, log_samples=False)
                higher = found.get("higher_is_better", {})
                measured |= {name: _metrics(results, higher.get(name, {})) for name, results in found["results"].items()}
        return measured


def better(measured: Measures, metric: str) -> Literal["lower", "higher"]:
    """Which way a metric of a task is better; runs of before that was noted count as the higher, the better."""
    return "lower" if metric in measured.get("lower_is_better", []) else "higher"


def interval(value: float, error: float | None) -> list[float]:
    """The 95 % interval of a metric, from its standard error; empty where there is none."""
    return [] if error is None else [value - 1.96 * error, value + 1.96 * error]


@functools.cache
def _manager() -> Any:
    """The harness's tasks. It reads thousands of definitions, which takes seconds."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _open(name: str) -> list[Any]:
    """The task of that name; a group as one, so that its mean is measured too."""
    known = _manager().all_tasks
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"--tasks {name}: not a .jsonl file, nor a task of lm-eval's{hint}; `lm-eval ls tasks` shows all")
    try:
        loaded = _manager().load([name])
    except Exception as error:  # a task may do anything to get its data
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"--tasks {name}: its data cannot be had ({reason}); go where the hub is reached, or leave it out"
        ) from error
    return [loaded["groups"][name]] if name in loaded["groups"] else [*loaded["tasks"].values()]


def _metrics(results: dict[str, Any], higher_is_better: dict[str, bool | None]) -> Measures:
    """From ``{"acc,none": …, "acc_stderr,none": …}``: the metrics, without the filter's name where there was no filter."""
    values = {name: value for name, value in results.items() if "," in name and "_stderr," not in name}
    errors = {name: results.get("_stderr,".join(name.rsplit(",", 1))) for name in values}
    return {
        "questions": results.get("sample_len"),
        **{name.removesuffix(",none"): float(value) for name, value in values.items()},
        "stderr": {
            name.removesuffix(",none"): None if isinstance(error, str) or error is None else float(error)
            for name, error in errors.items()
        },
        "lower_is_better": [name.removesuffix(",none") for name in values if higher_is_better.get(name.split(",")[0]) is False],
    }
