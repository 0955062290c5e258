"""The data set's card: a README.md that says what is in the folder and how it was made, and by which `datasets` finds the rows."""

from __future__ import annotations

from typing import Any

WHAT = {
    "kept": "to be learned, in conversations.jsonl",
    "empty": "nothing but blanks",
    "cut_off": "stopped by the limit of tokens",
    "repetition_loop": "a run of words four times in a row or more",
    "refusal": "opens like a refusal",
    "wrong_script": "less than 90 % of its letters are of the script asked for",
    "wrong_language": "in another language than asked for",
    "too_short": "fewer characters than asked for",
    "too_long": "more characters than asked for",
    "contaminated": "shares eight words in a row with a held-out prompt",
    "user": "the user's own function says no",
    "not_chosen": "another answer to the same prompt was chosen",
    "duplicate": "the same prompt and answer stand earlier",
    "near_duplicate": "an earlier answer says nearly the same",
}
"""What became of an answer, in the order in which it is asked."""


def counts_table(counts: dict[str, int]) -> str:
    """What became of the answers, as a table in Markdown."""
    rows = [f"| {name} | {counts[name]} | {what} |" for name, what in WHAT.items() if counts.get(name)]
    return "\n".join(["| answers | count | |", "|---|---|---|", *rows])


def dataset_card(made_with: dict[str, Any], counts: dict[str, int]) -> str:
    """The card of a data set with these settings and counts."""
    settings = "\n".join(f"| {name} | {value} |" for name, value in made_with.items() if value is not None)
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: conversations.jsonl
tags:
- distillation
- synthetic
---
# Answers of {made_with["teacher"]}

Conversations whose last turn `{made_with["teacher"]}` wrote, made with potstill for distillation. The teacher's licence and terms
may bind what is trained on them. A row of `conversations.jsonl`: `messages`; `cut_off`, whether the limit of tokens stopped the
answer; `teacher_ids`, the ids that the teacher sampled (null where its server does not say); `sampling`, how; `key`, a hash of all
that decides the answer. `answers/` holds every answer as it came, `dropped.jsonl` those that were filtered out and why,
`manifest.json` all of this for machines.

{counts_table(counts)}

| made with | |
|---|---|
{settings}
"""
