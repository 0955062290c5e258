"""`potstill demo`: answer, cut a student, distill and report, on two CPU cores.

Each stage is kept, as in distillation/run.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from potstill.commands.distill import DistillRecipe

# Chosen by layer_choice.py in four minutes: 3.1 nats per token from the teacher, evenly spaced 10.
LAYERS = [0, 1, 2, 8, 9, 10, 11, 20, 21, 22, 23, 24, 27, 28, 29]
ANSWER_TOKENS = 64


@dataclass(frozen=True)
class DemoRecipe:
    """Run everything on two CPU cores: teacher, student, distillation, evaluation, report."""

    output_dir: str = "runs/demo"
    """Folder of the run. The same command continues an interrupted one."""
    seconds: float = 180
    """Seconds of training."""


def run(recipe: DemoRecipe) -> None:
    """Run the demo."""
    from potstill.training.kept_memory import keep_freed_memory

    keep_freed_memory()
    demo(recipe.output_dir, seconds=recipe.seconds)


def demo(output_dir: str = "runs/demo", *, seconds: float = 180) -> Path:
    """Distill SmolLM2-135M-Instruct into half its layers; return the report's path."""
    from potstill.data import read_prompts
    from potstill.distillation import run_distillation
    from potstill.distillation.settings import default_settings
    from potstill.generation.dataset import CONVERSATIONS
    from potstill.models import locate
    from potstill.processes import print_main
    from potstill.run_folder import RunFolder
    from potstill.students import make_student

    folder = RunFolder(output_dir)
    before = folder.path / "student-before"
    recipe = DistillRecipe(
        teacher="demo",
        student=str(before),
        data=str(folder.data / "train" / CONVERSATIONS),
        eval_data=str(folder.data / "held_out" / CONVERSATIONS),
        output_dir=str(folder.path),
        seconds=seconds,
        learning_rate=6e-4,
        batch_size=4,
        eval_steps=0.25,
        freeze_embeddings=True,  # better after 30 steps: 2.14 nats, trained 2.22
        trainer={"adam_beta1": 0.8, "adam_beta2": 0.95},  # shorter averages for 200 steps
    )
    folder.refuse_other(dataclasses.asdict(recipe), defaults=default_settings())
    locate("demo")
    folder.begin(dataclasses.asdict(recipe))
    with resources.as_file(resources.files("potstill.data") / "demo_prompts.jsonl") as path:
        prompts = list(read_prompts(path))
    for split in ("train", "held_out"):
        messages = [prompt["messages"] for prompt in prompts if prompt["split"] == split]
        _answer_into(folder.data / split, messages)
    if not before.is_dir():
        print_main(f"cutting a student of {len(LAYERS)} layers from the teacher")
        make_student("demo", str(before), keep=LAYERS)
    return run_distillation(recipe)


def _answer_into(folder: Path, prompts: list[Any]) -> None:
    """Answer with the teacher below temperature 1, which suits a small model."""
    from potstill.generation import LocalEngine
    from potstill.generation.dataset import CONVERSATIONS
    from potstill.generation.make import make_dataset, standard_filters
    from potstill.models import load_model
    from potstill.sampling import Sampling

    if (folder / CONVERSATIONS).is_file():
        return
    model, tokenizer = load_model("demo", dtype="bfloat16")
    sampling = Sampling(max_new_tokens=ANSWER_TOKENS)
    engine = LocalEngine(model, tokenizer, sampling, source="demo", batch_size=40, unit_size=80)
    make_dataset(folder, prompts, engine, sampling, drop=standard_filters(keep={"cut_off"}))
