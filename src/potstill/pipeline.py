"""The stages of a run in order, each one kept, so that the same call after an interrupt goes on where it stopped.

    data → how many steps → training → student → evaluation → report

This is the application: it knows recipes and folders, prints what it does, and leaves every idea to the library below it.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_callback import ProgressCallback

from potstill.config import DistillRecipe, EvaluateRecipe
from potstill.data import read_conversations, without_answer
from potstill.data.chat_templates import ensure_chat_template
from potstill.doctor import quick_check
from potstill.errors import ConfigError, DataError, RunFolderError
from potstill.evaluation import HeldOut, Tasks, as_table, fingerprint, gap_closed, summarize
from potstill.evaluation.token_views import token_views
from potstill.generation import answer_prompts
from potstill.models import dtype_of, load_model, load_tokenizer, pick_device
from potstill.processes import agreed, is_main_process, process_count, say
from potstill.report import write_report
from potstill.report.verdict import verdict
from potstill.run_folder import RunFolder, whole_folder, write_json
from potstill.students import save_student
from potstill.training import DistillationConfig, DistillationTrainer, MetricsFile, ProgressBar, make_objective

REHEARSED_STEPS = 3
PASSES = 3
MOST_BETWEEN_CHECKPOINTS = 500
SAMPLES = 8
SAMPLE_TOKENS = 80
LIKELIEST = 5
"""Next tokens whose probabilities the report can show."""


def distill(recipe: DistillRecipe) -> Path:
    """Train, evaluate before and after, report. Called again it goes on where it stopped. Returns the report's path.

    In several processes all train, and the main one writes and measures.
    """
    _refuse_senseless(recipe)
    run = RunFolder(recipe.output_dir)
    measured = run.evaluation.is_file()
    run.refuse_other(dataclasses.asdict(recipe), but=("device", "tasks"))
    if measured and run.read_config().get("tasks") != recipe.tasks:
        raise RunFolderError(f"{run.evaluation}: measured with other tasks; delete it, and the same command measures again")
    tasks = Tasks("" if measured else recipe.tasks)
    if not run.student.is_dir():
        _train(run, recipe)
        _free_memory()
    if not is_main_process():
        return run.path / "report.html"
    if not measured:
        say("evaluating the student before and after, and the teacher")
        run.begin({**run.read_config(), "tasks": recipe.tasks})
        evaluation = _evaluate_run(run, recipe, tasks)
        write_json(run.evaluation, evaluation)
        table = as_table({name: evaluation[name] for name in ("teacher", "before", "after", "tasks") if name in evaluation})
        found = verdict(evaluation)
        say(f"\n{table}\n\n{found.headline} {found.reason}\n")
    page = write_report(run.path)
    say(f"report: {page}")
    return page


def evaluate(recipe: EvaluateRecipe) -> dict[str, Any]:
    """Measure a student and its teacher on held-out conversations: ``{"teacher": M, "student": M}`` (potstill.evaluation).

    With tasks also ``{"tasks": {"teacher": …, "student": …}}``, as `Tasks.measure` gives them.
    """
    opening: dict[str, Any] = {"device": recipe.device, "trust_remote_code": recipe.trust_remote_code}
    conversations = list(read_conversations(recipe.data))
    tasks = Tasks(recipe.tasks)
    pair = _held_out(recipe, conversations)
    dtype = dtype_of(recipe.precision)
    teacher, _ = load_model(recipe.teacher, dtype=dtype, **opening)
    student, _ = load_model(recipe.student, dtype=dtype, **opening)
    measured = {"teacher": summarize(pair.score_teacher(teacher)), "student": summarize(pair.score_student(student, teacher))}
    if not recipe.tasks:
        return measured
    abilities = {"teacher": tasks.measure(teacher, pair.teacher_tokenizer), "student": tasks.measure(student, pair.tokenizer)}
    return {**measured, "tasks": abilities}


def _train(run: RunFolder, recipe: DistillRecipe) -> None:
    """Open everything, so that what is wrong is known before anything is written; then train, from the last checkpoint on."""
    opening: dict[str, Any] = {"device": recipe.device, "trust_remote_code": recipe.trust_remote_code}
    check_pair(recipe)
    train, held_out = split_data(recipe)
    if not held_out:
        raise DataError("no conversation is left to hold out for evaluation; give --eval-data or more data")
    data = {"train": fingerprint(train), "held out": fingerprint(held_out)}
    run.refuse_other_data(data)
    _say_if_temperatures_differ(train, recipe)
    if recipe.precision == "fp16" and pick_device(recipe.device).type == "cpu":
        say("note: no float16 is computed on a CPU; training is in float32")
    arguments, tokenizer = _arguments(run, recipe), open_tokenizer(recipe.student, recipe)
    student, _ = load_model(recipe.student, dtype="float32", **opening)
    if recipe.freeze_embeddings:
        for module in (student.get_input_embeddings(), student.get_output_embeddings()):
            module.requires_grad_(False)
    teacher, teacher_tokenizer = None, None
    if recipe.method != "text":
        teacher_tokenizer = open_tokenizer(recipe.teacher, recipe)
        teacher, _ = load_model(recipe.teacher, dtype=dtype_of(recipe.precision), **opening)
    objective = make_objective(arguments, student, tokenizer, teacher, teacher_tokenizer)
    dataset, counts = objective.encode(train, max_length=recipe.max_length)
    say(f"data: {counts}; {len(held_out)} conversations held out")
    watched = objective.encode(held_out, max_length=recipe.max_length)[0] if recipe.eval_steps else None

    def trainer(**overrides: Any) -> DistillationTrainer:
        chosen = _arguments(run, recipe, **overrides)
        return DistillationTrainer(student, None, chosen, dataset, watched, tokenizer, objective=objective)

    max_steps = recipe.max_steps or agreed(run.planned_steps()) or _steps(recipe, len(dataset), trainer)
    training = trainer(max_steps=max_steps, **_saving(recipe, max_steps), **_watching(recipe))
    if is_main_process():
        run.begin({**dataclasses.asdict(recipe), "max_steps": max_steps})
        run.note_data(data)
    training.add_callback(MetricsFile(run.metrics, training))
    if training.pop_callback(ProgressCallback):  # there is none where the recipe's trainer settings want no bar
        training.add_callback(ProgressBar())
    checkpoint = agreed(run.last_checkpoint() if is_main_process() else None)
    say(f"training for {max_steps} steps" + (f", from {checkpoint.name} on" if checkpoint else ""))
    training.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    provenance = {
        "teacher": recipe.teacher,
        "student before": recipe.student,
        "method": f"cross, {recipe.alignment}" if recipe.method == "cross" else recipe.method,
        "steps": max_steps,
    }
    # Gathered from all processes, where FSDP keeps them in shards.
    weights = training.accelerator.get_state_dict(training.model_wrapped) if process_count() > 1 else None
    if is_main_process():
        with whole_folder(run.student) as unfinished:
            save_student(training.model, tokenizer, unfinished, provenance=provenance, weights=weights)


def _steps(recipe: DistillRecipe, conversations: int, trainer: Any) -> int:
    """What a budget in seconds allows; without one, enough to read the data three times."""
    if recipe.seconds is None:
        a_step = recipe.batch_size * recipe.gradient_accumulation_steps * process_count()
        return PASSES * -(-conversations // a_step)
    steps: int = agreed(max(1, int(recipe.seconds / _seconds_a_step(trainer))))
    say(f"{recipe.seconds:g} seconds are about {steps} steps")
    return steps


def _saving(recipe: DistillRecipe, max_steps: int) -> dict[str, int]:
    """A checkpoint every quarter of the run, and not more than an interrupt should cost; unless the recipe says otherwise."""
    if recipe.trainer.keys() & {"save_steps", "save_strategy"}:
        return {}
    return {"save_steps": min(MOST_BETWEEN_CHECKPOINTS, -(-max_steps // 4))}


def _watching(recipe: DistillRecipe) -> dict[str, Any]:
    """How often the held-out loss is measured while training."""
    if not recipe.eval_steps:
        return {}
    return {"eval_strategy": "steps", "eval_steps": recipe.eval_steps, "per_device_eval_batch_size": recipe.batch_size}


def _free_memory() -> None:
    """Trainer and callbacks hold one another, and with them both models and the optimizer."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _refuse_senseless(recipe: DistillRecipe) -> None:
    for name in ("batch_size", "gradient_accumulation_steps", "max_steps", "seconds", "max_length", "eval_steps"):
        value = getattr(recipe, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name} {value}: must be above 0")
    if recipe.trainer.get("eval_strategy", "no") not in ("no", False):
        raise ConfigError("trainer.eval_strategy: give eval_steps instead; how to measure follows from it")


def _say_if_temperatures_differ(train: list[dict[str, Any]], recipe: DistillRecipe) -> None:
    taken_at = recipe.teacher_temperature if recipe.method == "cross" else recipe.temperature
    sampled = {row["sampling"]["temperature"] for row in train if "sampling" in row} - {taken_at}
    if sampled and recipe.method != "text":
        say(
            f"note: text was sampled at temperature {', '.join(map(str, sorted(sampled)))}, the teacher's distribution is taken at "
            f"{taken_at:g}: the pair without bias has the same temperature in both"
        )


def _seconds_a_step(trainer: Any) -> float:
    """Time a few whole steps at learning rate 0: every cost is paid and not one weight changes."""
    say("timing a few steps")
    clock = _StepClock()
    rehearsal = trainer(max_steps=REHEARSED_STEPS + 1, learning_rate=0.0, weight_decay=0.0, save_strategy="no", disable_tqdm=True)
    rehearsal.add_callback(clock)
    rehearsal.train()
    return (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)  # the first step, which warms everything up, is not counted


class _StepClock(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())


def _arguments(run: RunFolder, recipe: DistillRecipe, **overrides: Any) -> DistillationConfig:
    device = pick_device(recipe.device)
    chosen: dict[str, Any] = {
        "output_dir": str(run.checkpoints),
        "method": recipe.method,
        "alignment": recipe.alignment,
        "teacher_temperature": recipe.teacher_temperature,
        "within_weight": recipe.within_weight,
        "divergence": recipe.divergence,
        "temperature": recipe.temperature,
        "hard_label_weight": recipe.hard_label_weight,
        "max_length": recipe.max_length,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "bf16": recipe.precision == "bf16",
        "fp16": recipe.precision == "fp16",
        "use_cpu": device.type == "cpu",
        "seed": recipe.seed,
        "logging_steps": 1,
        "save_total_limit": 2,
        "report_to": [],
        **recipe.trainer,
        **overrides,
    }
    known = {item.name for item in dataclasses.fields(DistillationConfig)}
    for name in chosen:
        if name not in known:
            raise ConfigError(f"trainer.{name}: transformers.TrainingArguments has no such setting; check its name")
    try:
        return DistillationConfig(**chosen)
    except (TypeError, ValueError) as error:  # in YAML a bare no is False
        said = " ".join(str(error).split())
        raise ConfigError(f"trainer: transformers says: {said}; check {', '.join(recipe.trainer)}") from error


def check_pair(recipe: DistillRecipe) -> None:
    """Refuse, from tokenizers alone, what no training could mend."""
    names = (recipe.teacher, recipe.student)
    teacher, student = (load_tokenizer(name, trust_remote_code=recipe.trust_remote_code) for name in names)
    remark = quick_check(teacher, student, recipe.method)
    if remark:
        say(remark)


def split_data(recipe: DistillRecipe) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Conversations to train on and conversations held out; these chosen by the seed where no file names them."""
    conversations = list(read_conversations(recipe.data))
    if recipe.eval_data:
        return conversations, list(read_conversations(recipe.eval_data))
    random.Random(recipe.seed).shuffle(conversations)
    count = max(1, round(len(conversations) * recipe.eval_fraction)) if len(conversations) > 1 else 0
    return conversations[count:], conversations[:count]


def open_tokenizer(source: str, recipe: DistillRecipe | EvaluateRecipe) -> Any:
    """The tokenizer that comes with a model, with the recipe's chat template if it has none."""
    tokenizer = load_tokenizer(source, trust_remote_code=recipe.trust_remote_code)
    ensure_chat_template(tokenizer, recipe.chat_template)
    return tokenizer


def _held_out(recipe: DistillRecipe | EvaluateRecipe, conversations: list[Any]) -> HeldOut:
    tokenizers = open_tokenizer(recipe.teacher, recipe), open_tokenizer(recipe.student, recipe)
    return HeldOut(*tokenizers, conversations, max_length=recipe.max_length)


def _evaluate_run(run: RunFolder, recipe: DistillRecipe, tasks: Tasks) -> dict[str, Any]:
    opening: dict[str, Any] = {
        "dtype": dtype_of(recipe.precision),
        "device": recipe.device,
        "trust_remote_code": recipe.trust_remote_code,
    }
    train, held_out = split_data(recipe)
    run.refuse_other_data({"held out": fingerprint(held_out)})
    pair = _held_out(recipe, held_out)
    asked = [without_answer(row["messages"]) for row in held_out[:SAMPLES] if "messages" in row]
    teacher, _ = load_model(recipe.teacher, **opening)
    scores = {"teacher": pair.score_teacher(teacher)}
    abilities = {"teacher": tasks.measure(teacher, pair.teacher_tokenizer)}
    answers = {"teacher": _sample_answers(teacher, pair.teacher_tokenizer, asked, recipe.seed)}
    for name, source in (("before", recipe.student), ("after", str(run.student))):
        student, _ = load_model(source, **opening)
        scores[name] = pair.score_student(student, teacher, likeliest=LIKELIEST)
        abilities[name] = tasks.measure(student, pair.tokenizer)
        answers[name] = _sample_answers(student, pair.tokenizer, asked, recipe.seed)
    measures = {name: summarize(one) for name, one in scores.items()}
    samples = [{"prompt": prompt[-1]["content"], **{name: answers[name][i] for name in answers}} for i, prompt in enumerate(asked)]
    return {
        **measures,
        "gap_closed": gap_closed(**measures),
        **({"tasks": abilities} if recipe.tasks else {}),
        "samples": samples,
        **token_views(pair, scores["before"], scores["after"]),
        "conversations": {**pair.per_conversation(scores), "train_prompts": fingerprint(train, of_prompts=True)},
        "train_conversations": len(train),
        "eval_conversations": len(held_out),
    }


def _sample_answers(model: Any, tokenizer: Any, prompts: list[Any], seed: int) -> list[str]:
    answered = answer_prompts(model, tokenizer, prompts, max_new_tokens=SAMPLE_TOKENS, seed=seed)
    return [row["messages"][-1]["content"] for row in answered]
