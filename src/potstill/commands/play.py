"""`potstill play`: talk to the three models of a run in a browser."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlayRecipe:
    """Talk to a run in the browser: teacher, student before and after (potstill[play])."""

    run_dir: str
    """Folder of a finished run of distill or demo."""
    host: str = "127.0.0.1"
    """Address to serve at: this machine alone. 0.0.0.0 lets others in, and asks them for no password."""
    port: int = 7860
    """Port to serve at."""
    device: str = "auto"
    """auto, cpu, cuda or mps: of all three models."""


def run(recipe: PlayRecipe) -> None:
    """Serve the page until interrupted."""
    from potstill.play.serve import play

    play(recipe.run_dir, host=recipe.host, port=recipe.port, device=recipe.device)
