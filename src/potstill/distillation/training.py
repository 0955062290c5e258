"""The training stage of a run: open and check all, plan the steps, train, save the student."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from typing import Any

import transformers
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from potstill.data import rows_fingerprint
from potstill.defaults import PASSES
from potstill.distillation.held_out import note_leaks, split_data
from potstill.distillation.pair import open_pairs_teacher, open_student
from potstill.distillation.settings import DistillSettings
from potstill.distillation.targets import (
    capture_missing,
    opener_of,
    require_targets,
    teacher_identity,
)
from potstill.distillation.trainer_settings import (
    checked_trainer_settings,
    loggers,
    make_arguments,
)
from potstill.doctor import quick_check
from potstill.errors import CollapsedRollouts, NonFiniteLoss, SelfCheckFailed
from potstill.evaluation import HeldOut, fingerprint
from potstill.generation.filters import users_function
from potstill.processes import broadcast_from_main, is_main_process, print_main, process_count
from potstill.progress import Progress
from potstill.run_folder import PROCESSES, RunFolder, whole_folder
from potstill.students import save_student
from potstill.teachers import open_teacher_tokenizer
from potstill.training import (
    DistillationConfig,
    DistillationTrainer,
    MetricsFile,
    TrainingProgress,
    make_objective,
)

TIMED_STEPS = 3
MOST_BETWEEN_CHECKPOINTS = 500
ROLLOUT_SETTINGS = (
    "on_policy",
    "on_policy_from",
    "rollout_size",
    "rollout_reuse",
    "rollout_tokens",
    "rollout_temperature",
)


def check_pair(settings: DistillSettings) -> None:
    """Refuse, from the tokenizers alone, what no training could fix."""
    opener = opener_of(settings)
    teacher = open_teacher_tokenizer(settings.teacher, opener)
    remark = quick_check(teacher, opener.tokenizer(settings.student), settings.method)
    if remark:
        print_main(remark)


def train(run: RunFolder, settings: DistillSettings) -> None:
    """Train from the last checkpoint on, and save the student.

    Everything is opened first, so that a mistake is known before anything is written.
    """
    training, held_out = split_data(settings)
    if settings.teacher_model:
        capture_missing(settings, [*training, *held_out])
    check_pair(settings)
    if is_main_process():
        note_leaks(training, held_out)
    _read_held_out(settings, held_out)
    data = {**_fingerprints(training, held_out), **teacher_identity(settings)}
    run.refuse_other_data(data)
    _note_precision_and_temperature(training, settings)
    base = _arguments(run, settings)
    student, tokenizer, objective = _open_pair(base, settings)
    dataset, counts = objective.encode(training, max_length=settings.max_length)
    print_main(f"data: {counts}; {len(held_out)} conversations held out")
    data["tokens"] = rows_fingerprint(dataset)
    run.refuse_other_data(data)
    require_targets(settings, base.loss_settings, dataset, held_out)
    watched = None
    if settings.eval_steps:
        watched = objective.encode(held_out, max_length=settings.max_length)[0]

    def trainer(**overrides: Any) -> DistillationTrainer:
        one = DistillationTrainer(
            model=student,
            args=_arguments(run, settings, **overrides),
            train_dataset=dataset,
            eval_dataset=watched,
            processing_class=tokenizer,
            objective=objective,
        )
        for callback in (ProgressCallback, PrinterCallback):  # TrainingProgress replaces them
            one.remove_callback(callback)
        return one

    max_steps = (
        settings.max_steps
        or broadcast_from_main(run.planned_steps())
        or _planned_steps(settings, len(dataset), trainer)
    )
    one = trainer(max_steps=max_steps, **_saving(settings, max_steps), **_watching(settings))
    if is_main_process():
        run.begin({**dataclasses.asdict(settings), "max_steps": max_steps})
        run.note_data(data)
    _train_from_checkpoint(one, run, settings, max_steps)
    _save(one, run, settings, max_steps)


def _fingerprints(training: Any, held_out: Any) -> dict[str, str]:
    processes = {PROCESSES: str(process_count())}
    return {"train": fingerprint(training), "held out": fingerprint(held_out), **processes}


def _read_held_out(settings: DistillSettings, held_out: list[dict[str, Any]]) -> None:
    """Encode the held-out conversations as evaluation will, to find what it would refuse."""
    opener = opener_of(settings)
    readers = open_teacher_tokenizer(settings.teacher, opener), opener.tokenizer(settings.student)
    HeldOut(*readers, held_out, max_length=settings.max_length)


def _open_pair(base: DistillationConfig, settings: DistillSettings) -> tuple[Any, Any, Any]:
    """Return student, its tokenizer and the objective."""
    student, tokenizer = open_student(settings, base)
    teacher = None
    if settings.method != "text":
        teacher = open_pairs_teacher(settings, base, student)
    return student, tokenizer, make_objective(base, student, tokenizer, teacher, None)


def _train_from_checkpoint(
    one: DistillationTrainer, run: RunFolder, settings: DistillSettings, max_steps: int
) -> None:
    found = run.last_checkpoint(processes=process_count()) if is_main_process() else None
    checkpoint = broadcast_from_main(found)
    start = f", from {checkpoint.name}" if checkpoint else ""
    print_main(f"training for {max_steps} steps{start}")
    progress = Progress(
        "training",
        max_steps,
        unit="steps",
        done=int(checkpoint.name.split("-")[-1]) if checkpoint else 0,
        leave=True,
        # The default of the arguments follows the verbosity of transformers.
        shown=not settings.trainer.get("disable_tqdm"),
    )
    metrics = MetricsFile(run.metrics, one)
    one.add_callback(metrics)
    one.add_callback(TrainingProgress(progress, metrics))
    try:
        with progress:
            one.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (CollapsedRollouts, NonFiniteLoss, SelfCheckFailed):
        if is_main_process() and checkpoint is None and not run.read_metrics()[0]:
            run.forget()  # no step was done: other settings can use the folder
        raise


def _save(
    one: DistillationTrainer, run: RunFolder, settings: DistillSettings, max_steps: int
) -> None:
    cross = f"cross, {settings.alignment}"
    provenance = {
        "teacher": settings.teacher,
        "student before": settings.student,
        "method": cross if settings.method == "cross" else settings.method,
        "steps": max_steps,
    }
    if settings.lora is not None:
        merge = "potstill student FOLDER --keep-layers all --output-dir MERGED"
        provenance["LoRA"] = f"rank {settings.lora}; merge it into its base with `{merge}`"
    weights = None
    if process_count() > 1:  # FSDP keeps weights in shards: gather them from all processes
        weights = one.accelerator.get_state_dict(one.model_wrapped)
    if is_main_process():
        if weights is not None:  # DeepSpeed copies a tied weight under each of its names
            names = {name for name, _ in one.model.named_parameters(remove_duplicate=False)}
            tied = names - {name for name, _ in one.model.named_parameters()}
            weights = {name: weight for name, weight in weights.items() if name not in tied}
        with whole_folder(run.student) as unfinished:
            save_student(
                one.model,
                one.processing_class,
                unfinished,
                provenance=provenance,
                weights=weights,
            )


def _planned_steps(settings: DistillSettings, conversations: int, trainer: Any) -> int:
    """Return the steps that fit into ``seconds``; without it, those of three passes."""
    if settings.seconds is None:
        per_step = settings.batch_size * settings.gradient_accumulation_steps * process_count()
        return PASSES * -(-conversations // per_step)
    fitting = max(1, int(settings.seconds / _seconds_per_step(settings, trainer)))
    steps: int = broadcast_from_main(fitting)
    print_main(f"{settings.seconds:g} seconds are about {steps} steps")
    return steps


def _saving(settings: DistillSettings, max_steps: int) -> dict[str, int]:
    """Save a checkpoint every quarter of the run, at least every 500 steps."""
    if settings.trainer.keys() & {"save_steps", "save_strategy"}:
        return {}
    return {"save_steps": min(MOST_BETWEEN_CHECKPOINTS, -(-max_steps // 4))}


def _watching(settings: DistillSettings) -> dict[str, Any]:
    if not settings.eval_steps:
        return {}
    watching = {"eval_strategy": "steps", "eval_steps": settings.eval_steps}
    if "per_device_eval_batch_size" in settings.trainer:
        return watching
    return {**watching, "per_device_eval_batch_size": settings.batch_size}


def _note_precision_and_temperature(rows: list[dict[str, Any]], settings: DistillSettings) -> None:
    if settings.precision == "fp16" and opener_of(settings).device_type() == "cpu":
        print_main("note: float16 is not computed on a CPU; training is in float32")
    cross = settings.method == "cross"
    taken_at = settings.teacher_temperature if cross else settings.temperature
    sampled = {row["sampling"]["temperature"] for row in rows if "sampling" in row} - {taken_at}
    if sampled and settings.method != "text":
        print_main(
            f"note: text was sampled at temperature {', '.join(map(str, sorted(sampled)))}, the "
            f"teacher's distribution at {taken_at:g}: the loss is unbiased if they are equal"
        )


def _seconds_per_step(settings: DistillSettings, trainer: Any) -> float:
    """Time a few whole steps at learning rate 0, which changes no weight."""
    print_main("timing a few steps")
    begins = settings.on_policy_from
    share = (1 - begins) * settings.on_policy
    off_policy = _timed(trainer, on_policy=0.0)[0] if share < 1 else 0.0
    if not share:
        return off_policy
    with tempfile.TemporaryDirectory(prefix="potstill-rollouts-") as folder:
        on_policy, seconds, batches = _timed(
            trainer, on_policy=1.0, on_policy_from=0.0, rollouts_dir=folder
        )
    # A round is made once for all passes over it.
    on_policy += settings.gradient_accumulation_steps * seconds / batches
    return (1 - share) * off_policy + share * on_policy


def _timed(trainer: Any, **settings: Any) -> tuple[float, float, int]:
    """Return seconds a step without rounds, seconds a round, and micro-batches trained on one."""
    clock = _StepClock()
    timed = trainer(
        max_steps=TIMED_STEPS + 1,
        learning_rate=0.0,
        weight_decay=0.0,
        save_strategy="no",
        **settings,
    )
    if timed.on_policy is not None:
        timed.on_policy.stops_at_collapse = False
    clock.on_policy = timed.on_policy
    timed.add_callback(clock)
    timed.train()
    # The first step warms up and is not counted.
    step = (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)
    if timed.on_policy is None:
        return step, 0.0, 1
    return step, timed.on_policy.seconds_per_round, timed.on_policy.per_round


class _StepClock(transformers.TrainerCallback):
    """Note the time after each step, without the time of rounds of rollouts."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.on_policy: Any = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        rounds = 0.0 if self.on_policy is None else self.on_policy.seconds
        self.times.append(time.perf_counter() - rounds)


def _divergence(name: str) -> Any:
    """Return the user's function for FILE.py:FUNCTION, and other names as they are."""
    return users_function(name) if ".py:" in name else name


def _arguments(run: RunFolder, settings: DistillSettings, **overrides: Any) -> DistillationConfig:
    same_names = (
        "method",
        "alignment",
        "teacher_temperature",
        "within_weight",
        "divergence_parameters",
        "temperature",
        "hard_label_weight",
        "max_length",
        "learning_rate",
        "gradient_accumulation_steps",
        "seed",
        *ROLLOUT_SETTINGS,
    )
    chosen: dict[str, Any] = {
        **{name: getattr(settings, name) for name in same_names},
        "output_dir": str(run.checkpoints),
        "divergence": _divergence(settings.divergence),
        "on_policy_divergence": _divergence(settings.on_policy_divergence),
        "rollouts_dir": str(run.rollouts),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "per_device_train_batch_size": settings.batch_size,
        "bf16": settings.precision == "bf16",
        "fp16": settings.precision == "fp16",
        "gradient_checkpointing": settings.activation_checkpointing,
        "use_cpu": opener_of(settings).device_type() == "cpu",
        "logging_steps": 1,
        "save_total_limit": 2,
        "report_to": loggers(settings.log_to),
        "run_name": run.path.name,
        **checked_trainer_settings(settings.trainer),
        **overrides,
    }
    return make_arguments(chosen, settings.trainer)
