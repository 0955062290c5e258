"""`potstill play`: chat with the three models of a run in a browser."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlayRecipe:
    """Chat with teacher, student before and after in a browser (needs potstill[play])."""

    run_dir: str
    """Folder of a finished run of distill or demo."""
    host: str = "127.0.0.1"
    """Address to serve at. 0.0.0.0 gives every machine access, without a password."""
    port: int = 7860
    """Port to serve at."""
    device: str = "auto"
    """auto, cpu, cuda or mps, for all three models."""


def run(recipe: PlayRecipe) -> None:
    """Serve the page until interrupted."""
    from potstill.play.serve import play

    play(recipe.run_dir, host=recipe.host, port=recipe.port, device=recipe.device)
