"""From files to token batches."""

from potstill.data.batches import IGNORED as IGNORED
from potstill.data.batches import BatchLayout as BatchLayout
from potstill.data.batches import TokenCounts as TokenCounts
from potstill.data.batches import encode_conversation as encode_conversation
from potstill.data.batches import rows_fingerprint as rows_fingerprint
from potstill.data.batches import tokenize_conversations as tokenize_conversations
from potstill.data.chat_templates import PLAIN_CHAT_TEMPLATE as PLAIN_CHAT_TEMPLATE
from potstill.data.conversations import read_conversations as read_conversations
from potstill.data.conversations import read_prompts as read_prompts
from potstill.data.forms import without_answer as without_answer
from potstill.data.pairs import PairCounts as PairCounts
from potstill.data.pairs import PairEncoder as PairEncoder
from potstill.data.pairs import PairLayout as PairLayout
from potstill.data.pairs import tokenize_pairs as tokenize_pairs
from potstill.reading import Reading as Reading

__all__ = [
    "IGNORED",
    "PLAIN_CHAT_TEMPLATE",
    "BatchLayout",
    "PairCounts",
    "PairEncoder",
    "PairLayout",
    "Reading",
    "TokenCounts",
    "encode_conversation",
    "read_conversations",
    "read_prompts",
    "rows_fingerprint",
    "tokenize_conversations",
    "tokenize_pairs",
    "without_answer",
]
