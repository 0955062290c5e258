"""Turn prompts into stored answers and a filtered data set that can be traced.

keys.py      prompts → requests, each with a key that decides its answer
engine.py    the interface of the engines local.py, server.py, vllm.py and ray.py
store.py     answers on disk, safe against kills
dataset.py   answers → conversations.jsonl, by filters.py; card.py describes it
"""

from potstill.generation.card import counts_table as counts_table
from potstill.generation.card import dataset_card as dataset_card
from potstill.generation.dataset import write_dataset as write_dataset
from potstill.generation.engine import Answer as Answer
from potstill.generation.engine import Engine as Engine
from potstill.generation.engine import Request as Request
from potstill.generation.keys import answered as answered
from potstill.generation.keys import requests as requests
from potstill.generation.local import LocalEngine as LocalEngine
from potstill.generation.local import answer_prompts as answer_prompts
from potstill.generation.server import ServerEngine as ServerEngine
from potstill.generation.store import AnswerStore as AnswerStore
from potstill.sampling.sampler import Sampling as Sampling

__all__ = [
    "Answer",
    "AnswerStore",
    "Engine",
    "LocalEngine",
    "Request",
    "Sampling",
    "ServerEngine",
    "answer_prompts",
    "answered",
    "counts_table",
    "dataset_card",
    "requests",
    "write_dataset",
]
