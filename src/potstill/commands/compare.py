"""`potstill compare`: train methods with the same data and budget, and compare them.

OUTPUT_DIR/
  config.yaml         the settings
  data/               train.jsonl and held_out.jsonl; reference.jsonl: the reference answers
  text-seed0/         one run folder per method and seed; it also holds answers.jsonl
  untouched/          answers.jsonl of the student before training
  comparison.json     measures, differences with intervals, verdicts, regressions
  comparison.html     the page

Finished runs are kept: the same command continues after an interrupt, and a command with more
methods or seeds adds runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from potstill.commands.distill import DistillRecipe
from potstill.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CompareRecipe(DistillRecipe):
    """Train several methods on the same data and budget; report which is best."""

    teacher: str = ""
    """Hub id, model folder, GGUF file, or demo."""
    student: str = ""
    """The model to train, given like the teacher. Every method starts from it."""
    data: str = ""
    """Conversations with the teacher's answers. A row's "reference" is an answer from another
    source, for the method reference."""
    method: str = "logits"
    """Not used; accepted because a file for distill may contain it. See --methods."""
    methods: str | None = None
    """Separated by commas: text, logits, cross, on-policy (logits or cross, with half of the
    micro-batches written by the student, or the share given as --on-policy), reference
    (cross-entropy on reference answers). Default: reference if every row has one, text, and
    logits (cross if the tokenizers differ). The untrained student is always compared, too."""
    recipes: str | None = None
    """Instead of methods: YAML files for distill with the same data and budget, separated by
    commas."""
    runs: str | None = None
    """Instead of training: folders of finished runs, separated by commas. Folders that differ only
    in -seedN belong to one method."""
    seeds: str = "0"
    """Separated by commas. Each method is trained once with each seed."""
    answers: int = 32
    """Held-out prompts that each student answers, to measure whether answers stop or loop, and
    their length. 0: none."""
    answer_tokens: int = 128
    """Maximum number of tokens of these answers."""
    text_measures: str = ""
    """chrf, rouge_l or both, separated by a comma: compare answers with the teacher's (needs
    potstill[measures])."""


def run(recipe: CompareRecipe) -> None:
    """Compare and print the table."""
    from potstill.commands.compare_methods import compare, listed
    from potstill.commands.parsing import parse
    from potstill.comparison import as_text
    from potstill.processes import print_main
    from potstill.training.kept_memory import keep_freed_memory

    if recipe.device in ("auto", "cpu"):
        keep_freed_memory()
    files = listed(recipe.recipes)
    recipes = {Path(file).stem: parse(["distill", "--config", file])[1] for file in files}
    if files and len(recipes) < max(2, len(files)):
        raise ConfigError(f"--recipes {recipe.recipes}: give two or more files of different names")
    comparison = compare(recipe, recipes)
    page = Path(recipe.output_dir).expanduser() / "comparison.html"
    print_main(f"\n{as_text(comparison)}\n")
    print(f"page: {page}")
