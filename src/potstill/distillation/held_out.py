"""Which conversations are trained on, and which are held out for evaluation."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from typing import Any

from potstill.data import read_conversations
from potstill.data.split import near_duplicates, prompt_key
from potstill.distillation.settings import DistillSettings
from potstill.errors import DataError
from potstill.processes import print_main

Conversations = list[dict[str, Any]]


def split_data(settings: DistillSettings) -> tuple[Conversations, Conversations]:
    """Return training and held-out conversations, split by the seed if no file names the latter.

    The split is by prompt: all answers to one prompt are on the same side. Raises: DataError if a
    side is empty.
    """
    reading = settings.reading
    conversations = list(read_conversations(settings.data, reading=reading))
    if settings.eval_data or settings.eval_split:
        file = settings.eval_data or settings.data
        split = dataclasses.replace(reading, split=settings.eval_split or reading.split)
        held_out = list(read_conversations(file, reading=split))
        for name, rows in ((settings.data, conversations), (file, held_out)):
            if not rows:
                raise DataError(f"{name}: no conversation there; give a file with conversations")
        return conversations, held_out
    random.Random(settings.seed).shuffle(conversations)
    keys = [prompt_key(conversation) for conversation in conversations]
    sizes, chosen = Counter(keys), set[str]()
    count = max(1, round(len(conversations) * settings.eval_fraction))
    held = 0
    for key in keys:
        if held >= count:
            break
        if key not in chosen:
            chosen.add(key)
            held += sizes[key]
    training = [one for one, key in zip(conversations, keys, strict=True) if key not in chosen]
    held_out = [one for one, key in zip(conversations, keys, strict=True) if key in chosen]
    if not training or not held_out:
        raise DataError(
            f"{settings.data}: no conversation is left to hold out or to train on (there are "
            f"{len(conversations)}, with {len(sizes)} different prompts); give --eval-data"
        )
    return training, held_out


def note_leaks(training: Conversations, held_out: Conversations) -> None:
    """Print how many held-out prompts are trained on, or nearly so."""
    known = {prompt_key(conversation) for conversation in training}
    same = sum(prompt_key(conversation) in known for conversation in held_out)
    near = near_duplicates(training, held_out)
    if same or near:
        print_main(
            f"note: of {len(held_out)} held-out prompts, {same} are also in the training data, "
            f"and {near} are there in nearly the same words: these are not a test of new prompts"
        )
