"""`potstill serve`: offer a teacher's hidden states to training on other machines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServeRecipe:
    """Serve a teacher's hidden states, for `potstill distill http://HOST:PORT STUDENT`."""

    teacher: str
    """Hub id, model folder, GGUF file, or demo."""
    host: str = "127.0.0.1"
    """Address to serve at. Others than this machine's own need a token in POTSTILL_TOKEN."""
    port: int = 8790
    """Port to serve at; 0 takes a free one."""
    chat_template: str | None = None
    """The path of a Jinja template, or plain for tokenizers that have none."""
    precision: str = "bf16"
    """bf16, fp16 or fp32."""
    quantize_teacher: str | None = None
    """8bit or 4bit: quantize the weights of the teacher, except its LM head (needs
    potstill[quantize])."""
    device: str = "auto"
    """auto, cpu, cuda or mps. With auto or cuda, a model that is too large for one card is spread
    over the cards of the machine."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Read it first."""


def run(recipe: ServeRecipe) -> None:
    """Serve until interrupted."""
    import importlib.util

    from potstill.errors import ConfigError

    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"serve needs the package {package}: pip install 'potstill[serve]'")
    from potstill.models import ModelOpener, dtype_of
    from potstill.models.quantized import check_kind
    from potstill.teachers.serve import serve

    check_kind(recipe.quantize_teacher)
    opener = ModelOpener(
        device=recipe.device,
        dtype=dtype_of(recipe.precision),
        chat_template=recipe.chat_template,
        trust_remote_code=recipe.trust_remote_code,
        quantize=recipe.quantize_teacher,
    )
    serve(recipe.teacher, opener, host=recipe.host, port=recipe.port)
