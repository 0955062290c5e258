"""The stages of a run in order. Each is kept, so the same call continues an interrupted run.

data → how many steps → training → student → evaluation → report
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from potstill.data.forms import as_conversation
from potstill.distillation.held_out import split_data
from potstill.distillation.settings import DistillSettings, check_names, default_settings
from potstill.distillation.targets import open_measured_teacher, opener_of, teacher_identity
from potstill.distillation.training import train
from potstill.errors import RunFolderError
from potstill.evaluation import (
    Evaluation,
    HeldOut,
    Tasks,
    as_table,
    fingerprint,
    gap_closed,
    summarize,
)
from potstill.evaluation.held_out import last_question, prompts_of
from potstill.evaluation.token_views import token_views
from potstill.generation import answer_prompts
from potstill.models import load_model
from potstill.models.chat_template import kept_date
from potstill.processes import broadcast_from_main, is_main_process, print_main
from potstill.protocols import CausalLM, Tokenizer
from potstill.report import write_report
from potstill.report.verdict import verdict
from potstill.run_folder import RunFolder, write_json, write_whole
from potstill.teachers import captured_date, open_teacher_tokenizer
from potstill.teachers.quantization_cost import cost_text

SAMPLES = 8
SAMPLE_TOKENS = 80
LIKELIEST = 5
"""Next tokens whose probabilities the report can show."""


@dataclass(frozen=True)
class Run:
    """A finished run, as `distill` returns it. Models are opened when they are asked for."""

    folder: Path

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        return self.folder / "report.html"

    @functools.cached_property
    def _opened(self) -> tuple[CausalLM, Tokenizer]:
        return load_model(self.folder / "student")

    @property
    def student(self) -> CausalLM:
        """The trained student, in evaluation mode."""
        return self._opened[0]

    @property
    def tokenizer(self) -> Tokenizer:
        """The student's tokenizer."""
        return self._opened[1]

    @property
    def evaluation(self) -> Evaluation:
        """The trained student on the held-out conversations."""
        return Evaluation.of_run(self._measured, "after")

    @property
    def evaluation_before(self) -> Evaluation:
        """The student before training, on the same conversations."""
        return Evaluation.of_run(self._measured, "before")

    @functools.cached_property
    def _measured(self) -> dict[str, Any]:
        return RunFolder(self.folder).read_evaluation()


def distill(
    teacher: str | Path,
    student: str | Path,
    data: str | Path | Iterable[Mapping[str, Any]],
    *,
    method: str = "logits",
    output_dir: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Train ``student`` towards ``teacher``, evaluate before and after, write a report.

    ``teacher`` and ``student`` are a hub id, folder, GGUF file or ``demo``; ``data`` is a file, a
    data set's name or conversations. Without ``output_dir`` the run goes into a new temporary
    folder. ``settings`` are those of `DistillSettings`, the flags of `potstill distill`. Called
    again with the same ``output_dir`` it continues an interrupted run.

    Raises: PotstillError (see potstill.errors).
    """
    check_names(settings)
    folder = Path(output_dir or tempfile.mkdtemp(prefix="potstill-")).expanduser()
    source = str(data) if isinstance(data, str | Path) else _write_data(folder, data)
    chosen = DistillSettings(
        str(teacher), str(student), source, str(folder), method=method, **settings
    )
    return Run(run_distillation(chosen).parent)


def _write_data(folder: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write conversations beside the run's folder, where another call finds the same."""
    checked = [as_conversation(dict(row), f"row {number}") for number, row in enumerate(rows, 1)]
    file = folder.with_name(f"{folder.name}-data.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in checked))
    return str(file)


def run_distillation(settings: DistillSettings) -> Path:
    """Run every stage that is not done yet; return the report's path.

    In several processes all train, and the main process writes and evaluates.
    """
    settings.check()
    run = RunFolder(settings.output_dir)
    settings = dataclasses.replace(settings, template_date=_template_date(run, settings))
    measured = run.evaluation.is_file()
    run.refuse_other(
        dataclasses.asdict(settings), but=("device", "tasks"), defaults=default_settings()
    )
    if measured and run.read_config().get("tasks") != settings.tasks:
        raise RunFolderError(
            f"{run.evaluation}: measured with other tasks; delete it to measure again"
        )
    tasks = Tasks("" if measured else settings.tasks)
    if not run.student.is_dir():
        train(run, settings)
        _free_memory()
    if not is_main_process():
        return run.path / "report.html"
    if not measured:
        print_main("evaluating the student before and after, and the teacher")
        run.begin({**run.read_config(), "tasks": settings.tasks})
        evaluation = _evaluate_run(run, settings, tasks)
        write_json(run.evaluation, evaluation)
        names = [name for name in ("teacher", "before", "after", "tasks") if name in evaluation]
        table = as_table({name: evaluation[name] for name in names})
        found = verdict(evaluation)
        print_main(f"\n{table}\n\n{found.headline} {found.reason}\n")
        if "quantization" in evaluation:
            quantized = evaluation["quantization"]
            print_main(
                f"the teacher is quantized ({quantized['quantization']}): {cost_text(quantized)}"
            )
    page = write_report(run.path)
    print_main(f"report: {page}")
    return page


def _template_date(run: RunFolder, settings: DistillSettings) -> str:
    """Return the date for chat templates: a run that is continued on another day keeps its own."""
    stored = run.read_config().get("template_date") if run.config.is_file() else None
    date = kept_date(settings.template_date, stored, captured_date(settings.teacher))
    return broadcast_from_main(date)


def _free_memory() -> None:
    # Trainer and callbacks refer to each other, and keep both models and the optimizer alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _evaluate_run(run: RunFolder, settings: DistillSettings, tasks: Tasks) -> dict[str, Any]:
    opener = opener_of(settings)
    training, held_out = split_data(settings)
    run.refuse_other_data({"held out": fingerprint(held_out), **teacher_identity(settings)})
    tokenizers = (
        open_teacher_tokenizer(settings.teacher, opener),
        opener.tokenizer(settings.student),
    )
    pair = HeldOut(*tokenizers, held_out, max_length=settings.max_length)
    shown = [row for row in held_out if "messages" in row][:SAMPLES]
    asked = prompts_of(shown)
    teacher, quantization = open_measured_teacher(settings, pair.teacher_dataset)
    scores, abilities = {"teacher": pair.score_teacher(teacher)}, {}
    answers = {"teacher": [str(row["messages"][-1]["content"]) for row in shown]}
    if teacher.model is not None:
        abilities["teacher"] = tasks.measure(teacher.model, pair.teacher_tokenizer)
        answers["teacher"] = _sample(teacher.model, pair.teacher_tokenizer, asked, settings.seed)
    for name, source in (("before", settings.student), ("after", str(run.student))):
        student = opener.model(source)
        scores[name] = pair.score_student(student, teacher, likeliest=LIKELIEST, own_answers=True)
        abilities[name] = tasks.measure(student, pair.tokenizer)
        answers[name] = _sample(student, pair.tokenizer, asked, settings.seed)
    measures = {name: summarize(one) for name, one in scores.items()}
    samples = [
        {"prompt": last_question(prompt)} | {name: answers[name][i] for name in answers}
        for i, prompt in enumerate(asked)
    ]
    return {
        **measures,
        "gap_closed": gap_closed(**measures),
        **({"quantization": quantization} if quantization else {}),
        **({"tasks": abilities} if settings.tasks else {}),
        "samples": samples,
        **token_views(pair, scores["before"], scores["after"]),
        "conversations": {
            **pair.per_conversation(scores),
            "train_prompts": fingerprint(training, of_prompts=True),
        },
        "train_conversations": len(training),
        "eval_conversations": len(held_out),
    }


def _sample(model: CausalLM, tokenizer: Tokenizer, prompts: list[Any], seed: int) -> list[str]:
    rows = answer_prompts(model, tokenizer, prompts, max_new_tokens=SAMPLE_TOKENS, seed=seed)
    return [row["messages"][-1]["content"] for row in rows]
