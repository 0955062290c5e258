"""Show a finished run in the browser: players.py (models), answers.py (tokens), page.py (page)."""

from potstill.play.answers import Candidate, next_tokens, stream_answers
from potstill.play.players import Player, open_players

__all__ = [
    "Candidate",
    "Player",
    "next_tokens",
    "open_players",
    "stream_answers",
]
