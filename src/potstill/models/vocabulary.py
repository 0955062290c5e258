"""Check token ids against the rows of a model's embedding: a tokenizer can have more tokens."""

from __future__ import annotations

from typing import Any

from potstill.errors import ModelError
from potstill.protocols import CausalLM, Tokenizer


def embedding_rows(model: CausalLM) -> int:
    """Return the number of token ids that ``model`` can read."""
    return len(model.get_input_embeddings().weight)


def padding_id(tokenizer: Tokenizer, model: CausalLM) -> int:
    """Return an id for padding, which is masked: the tokenizer's if the model has it, else 0."""
    pad = tokenizer.pad_token_id
    return pad if pad is not None and 0 <= pad < embedding_rows(model) else 0


def refuse_unknown_ids(model: CausalLM, highest: int, *, role: str) -> None:
    """Check the highest token id of the data that ``model``, the ``role``, is to read.

    A tokenizer can have tokens that no text contains, so its size alone is not decisive.
    Raises: ModelError.
    """
    rows = embedding_rows(model)
    if highest >= rows:
        raise ModelError(
            f"the data has the token id {highest}, and the {role} {model.config.name_or_path} has "
            f"only {rows} rows in its vocabulary: its tokenizer has tokens that were added without "
            "resize_token_embeddings; give the tokenizer of this model, or resize the model"
        )


def highest_id(dataset: Any, column: str) -> int:
    """Return the highest id in a column of token ids; -1 for a stream or an empty data set."""
    if not hasattr(dataset, "column_names"):
        rows = dataset if isinstance(dataset, list) else []
        return max((i for row in rows for i in row.get(column, ())), default=-1)
    if column not in (dataset.column_names or ()) or not hasattr(dataset, "data"):
        return -1
    import pyarrow.compute as arrow

    highest = arrow.max(arrow.list_flatten(dataset.data.column(column))).as_py()
    return -1 if highest is None else int(highest)
