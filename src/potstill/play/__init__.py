"""A playground for a finished run: who plays (players.py), their answers and next tokens (answers.py), the page (page.py)."""

from potstill.play.answers import Candidate, next_tokens, stream_answers
from potstill.play.players import Player, open_players

__all__ = [
    "Candidate",
    "Player",
    "next_tokens",
    "open_players",
    "stream_answers",
]
