"""The teacher's text: prompts → answers that are kept → a data set that is clean and can be traced.

keys.py      prompts → requests, each with a key that decides its answer
engine.py    what answers them: local.py (a refilled batch, batch.py), server.py, vllm.py, ray.py; how: sampling.py
store.py     answers on the disk, through any kill
dataset.py   answers → conversations.jsonl, by filters.py, duplicates.py and a choice among samples; card.py tells what became of
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
from potstill.sampling.sampler import Sampling as Sampling
from potstill.generation.server import ServerEngine as ServerEngine
from potstill.generation.store import AnswerStore as AnswerStore

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
