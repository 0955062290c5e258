"""Write the data set's card: a README.md for people and for `datasets`."""

from __future__ import annotations

from collections.abc import Mapping

WHAT = {
    "kept": "written to conversations.jsonl",
    "empty": "only white space",
    "cut_off": "stopped by the token limit",
    "repetition_loop": "a run of words repeated four times or more in a row",
    "refusal": "starts like a refusal",
    "wrong_script": "less than 90 % of the letters are of the requested script",
    "wrong_language": "not in the requested language",
    "too_short": "fewer characters than requested",
    "too_long": "more characters than requested",
    "contaminated": "shares eight words in a row with a held-out prompt",
    "user": "rejected by the user's function",
    "not_chosen": "another answer to the same prompt was chosen",
    "duplicate": "same prompt and answer as an earlier row",
    "near_duplicate": "nearly the same as an earlier answer",
}
"""Explanation of every outcome for an answer, in the order of the checks."""


def counts_table(counts: Mapping[str, int]) -> str:
    """Return a Markdown table with the number of answers per outcome."""
    rows = [f"| {name} | {counts[name]} | {WHAT[name]} |" for name in WHAT if counts.get(name)]
    return "\n".join(["| answers | count | |", "|---|---|---|", *rows])


def dataset_card(made_with: Mapping[str, object], counts: Mapping[str, int]) -> str:
    """Return the card of a data set with these settings and counts."""
    known = {name: value for name, value in made_with.items() if value is not None}
    settings = "\n".join(f"| {name} | {value} |" for name, value in known.items())
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

Conversations for distillation, made with potstill; the last turn is by `{made_with["teacher"]}`.
The teacher's license and terms may apply to models trained on them.

`conversations.jsonl` has one row per conversation: `messages`; `cut_off`, whether the token limit
stopped the answer; `teacher_ids`, the sampled token ids (null if the server does not return them);
`sampling`, the settings; `key`, a hash of everything that decides the answer. `answers/` holds all
answers, `dropped.jsonl` the dropped rows with reasons, `manifest.json` the settings and counts.

{counts_table(counts)}

| made with | |
|---|---|
{settings}
"""
