"""Read conversations and prompts, from a file or from anything that `datasets` opens.

Every row becomes one of two:

    {"messages": [{"role", "content"}, …]}   optional: "tools", which the template is given
    {"text": …}                              plain text, all of it supervised

`forms.py` lists the forms that are read. Optional keys are ``"cut_off"`` (a length limit stopped
the last answer, so its end is not learned), ``"teacher_ids"`` (the ids sampled for it),
``"sampling"`` (how) and ``"reference"`` (an answer that is not the teacher's, to compare with).
Other keys are left alone, except those that mean something to other trainers: these are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from potstill.data.files import Source, rows_of
from potstill.data.forms import as_conversation, as_prompt, renamed, without_answer
from potstill.errors import DataError
from potstill.reading import Reading

Conversation = dict[str, Any]


def read_conversations(
    source: Source,
    *,
    split: str = "train",
    reading: Reading | None = None,
    streaming: bool = False,
) -> Iterator[Conversation]:
    """Yield the conversations of a source (see `files.rows_of`).

    ``reading`` has all settings, ``split`` included; ``streaming`` does not download a data set
    whole. Raises: DataError for a missing or unreadable source, or with file and line for a row in
    none of the known forms.
    """
    reading = reading or Reading(split=split)
    for place, row in _rows(source, reading, streaming):
        conversation = as_conversation(row, place)
        if reading.merge_system and "messages" in conversation:
            conversation["messages"] = with_system_merged(conversation["messages"], place)
        yield conversation


def read_prompts(source: Source, *, reading: Reading | None = None) -> Iterator[Conversation]:
    """Yield rows as ``{"messages": …}`` that end with a user's turn; other keys are kept.

    An answer (``completion``, or the last assistant turn) is dropped. Raises: DataError.
    """
    reading = reading or Reading()
    for place, row in _rows(source, reading, False):
        prompt = as_prompt(row, place)
        if reading.merge_system:
            prompt["messages"] = with_system_merged(prompt["messages"], place)
        yield prompt


def with_reference(conversation: Conversation) -> Conversation:
    """Return the conversation with its ``reference`` in place of the teacher's last answer."""
    turn = {"role": "assistant", "content": conversation["reference"]}
    tools = {name: conversation[name] for name in ("tools",) if name in conversation}
    return {"messages": [*without_answer(conversation["messages"]), turn], **tools}


def with_system_merged(messages: list[dict[str, Any]], place: str) -> list[dict[str, Any]]:
    """Return the messages with the system prompt before the text of the first user turn."""
    if messages[0]["role"] != "system":
        return messages
    if len(messages) < 2 or messages[1]["role"] != "user":
        raise DataError(f"{place}: no user turn after the system prompt to merge it into")
    merged = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{**messages[1], "content": merged}, *messages[2:]]


def _rows(
    source: Source, reading: Reading, streaming: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    columns = reading.renamed_columns()
    rows = rows_of(source, split=reading.split, name=reading.data_name, streaming=streaming)
    for place, row in rows:
        yield place, renamed(row, columns, place)
