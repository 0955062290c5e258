"""`potstill capture`: store a teacher's knowledge of conversations, to train without it."""

from __future__ import annotations

from dataclasses import dataclass

from potstill.defaults import MAX_LENGTH
from potstill.reading import Reading


@dataclass(frozen=True)
class CaptureRecipe(Reading):
    """Store a teacher's hidden states on conversations, to train without the teacher."""

    teacher: str
    """Hub id, model folder, GGUF file, or demo."""
    data: str
    """Conversations with answers, as a .jsonl file or a data set's name."""
    output_dir: str
    """Folder of the capture; the same command continues an interrupted one."""
    keep: str = "states"
    """states (exact), states8 (8 bits, half the size), or sparse (about 33 bytes a token;
    forward_kl with the same tokenizer only)."""
    threshold: float = 0.025
    """sparse: tokens of at least this probability are kept, others are sampled."""
    engine: str = "local"
    """local, in this process; ray, on many machines. The first shard is computed here."""
    workers: int = 2
    """Actors of the ray engine, each with a GPU if there is one."""
    max_length: int = MAX_LENGTH
    """Tokens at which a conversation is cut; use the same for distill."""
    chat_template: str | None = None
    """The path of a Jinja template, or plain for tokenizers that have none."""
    template_date: str | None = None
    """The date that templates write, as 2026-01-31; without it the day of the capture."""
    precision: str = "bf16"
    """bf16, fp16 or fp32."""
    quantize_teacher: str | None = None
    """8bit or 4bit: quantize the weights of the teacher, except its LM head (needs
    potstill[quantize])."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Read it first."""


def run(recipe: CaptureRecipe) -> None:
    """Capture, and print what was captured."""
    from potstill.data import read_conversations
    from potstill.models import ModelOpener
    from potstill.processes import print_main
    from potstill.teachers import capture_conversations

    counts = capture_conversations(
        recipe.teacher,
        read_conversations(recipe.data, reading=recipe),
        recipe.output_dir,
        keep=recipe.keep,
        threshold=recipe.threshold,
        max_length=recipe.max_length,
        opener=ModelOpener.of_teacher(recipe),
        engine=recipe.engine,
        workers=recipe.workers,
    )
    print_main(f"{recipe.output_dir}: {counts}")
    print(f"next: potstill distill {recipe.output_dir} STUDENT --data {recipe.data}")
