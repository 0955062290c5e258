"""`potstill data`: show rows of a data set as a model will learn them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from potstill.defaults import MAX_LENGTH
from potstill.reading import Reading


@dataclass(frozen=True)
class DataRecipe(Reading):
    """Show rows of a data set as a model will learn them: what is masked, what is learned."""

    data: str
    """Conversations: .jsonl files (several with commas or *), or anything that datasets opens."""
    model: str
    """The model whose tokenizer and chat template read them: hub id, folder, GGUF file, demo."""
    rows: int = 3
    """Number of rows to show."""
    max_length: int = MAX_LENGTH
    """Tokens at which a conversation is cut."""
    chat_template: str | None = None
    """The path of a Jinja template, or plain for tokenizers that have none."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Read it first."""


def run(recipe: DataRecipe) -> None:
    """Print the rows."""
    from potstill.data import read_conversations
    from potstill.data.preview import preview
    from potstill.errors import ConfigError, DataError
    from potstill.models import ModelOpener

    if recipe.rows < 1:
        raise ConfigError(f"--rows {recipe.rows}: must be at least 1")
    opener = ModelOpener(
        chat_template=recipe.chat_template, trust_remote_code=recipe.trust_remote_code
    )
    tokenizer = opener.tokenizer(recipe.model)
    rows = read_conversations(recipe.data, reading=recipe)
    first = list(itertools.islice(rows, recipe.rows))
    if not first:
        raise DataError(f"{recipe.data}: no conversation there; give a file with conversations")
    print(preview(first, tokenizer, recipe.model, max_length=recipe.max_length))
