"""`potstill generate`: let a teacher answer prompts and make a filtered data set of the answers."""

from __future__ import annotations

from dataclasses import dataclass

from potstill.reading import Reading


@dataclass(frozen=True)
class GenerateRecipe(Reading):
    """Let a teacher answer prompts, and make a filtered data set of its answers."""

    teacher: str
    """Hub id, model folder, GGUF file, or demo; with --server, its name on the server."""
    prompts: str
    """A .jsonl file of {"prompt"} or {"messages"}, or a data set's name."""
    output_dir: str
    """Folder for the data set. The same command continues an interrupted one."""
    engine: str = "local"
    """local (transformers) or vllm, in this process; ray or ray-vllm, on many machines."""
    server: str | None = None
    """OpenAI-compatible server to use. The key is in POTSTILL_API_KEY or OPENAI_API_KEY."""
    max_new_tokens: int = 256
    """Tokens at which an answer is cut off."""
    temperature: float = 0.7
    """Divides the teacher's logits; 0 takes the most likely token."""
    top_p: float = 0.95
    """Sample among the most likely tokens with this total probability."""
    samples: int = 1
    """Answers to each prompt."""
    system: str | None = None
    """System prompt for the prompts that have none."""
    seed: int = 0
    """A different seed gives different answers."""
    choose: str = "all"
    """Samples to keep: all, shortest, likeliest (by the teacher), or FILE.py:FUNCTION."""
    keep: str = ""
    """Reasons that do not drop an answer, separated by commas: cut_off, refusal, empty, …"""
    min_characters: int = 0
    """Drop shorter answers."""
    max_characters: int | None = None
    """Drop longer answers."""
    script: str | None = None
    """Drop answers in another script: latin, cyrillic, arabic, cjk, hangul, …"""
    language: str | None = None
    """Drop answers in another language: en, fr, zh, … (needs py3langid)."""
    similarity: float = 0.8
    """Drop answers with this Jaccard similarity (3 words) to an earlier one; 1 drops none."""
    held_out: str | None = None
    """Evaluation prompts. Answers that share eight consecutive words with one are dropped."""
    filter: str | None = None
    """FILE.py:FUNCTION that returns True for a row to keep."""
    batch_size: int = 32
    """Prompts in a batch; with --server, parallel requests."""
    workers: int = 2
    """Actors of the ray engines, each with a GPU if there is one."""
    patience: float = 300
    """Seconds of retries for a server that does not answer."""
    chat_template: str | None = None
    """The path of a Jinja template, or plain for tokenizers that have none."""
    template_date: str | None = None
    """The date that templates write, as 2026-01-31; without it the day of the first answer."""
    precision: str = "bf16"
    """bf16, fp16 or fp32."""
    quantize_teacher: str | None = None
    """8bit or 4bit: quantize the weights of the teacher, except its LM head (needs
    potstill[quantize]; not with vllm and --server)."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Read it first."""


def run(recipe: GenerateRecipe) -> None:
    """Make the data set and print its path."""
    from potstill.commands.generate_dataset import generate

    print(f"data: {generate(recipe)}")
