"""Open models and tokenizers (sources.py, opener.py); read hidden states and heads (heads.py).

What is opened is checked: files.py before, weights.py after. adapters.py and gguf.py are formats.
"""

from potstill.models.gguf import cache_folder as cache_folder
from potstill.models.opener import ModelOpener as ModelOpener
from potstill.models.sources import DTYPES as DTYPES
from potstill.models.sources import dtype_of as dtype_of
from potstill.models.sources import load_config as load_config
from potstill.models.sources import load_generation_config as load_generation_config
from potstill.models.sources import load_model as load_model
from potstill.models.sources import load_tokenizer as load_tokenizer
from potstill.models.sources import locate as locate
from potstill.models.sources import pick_device as pick_device

__all__ = [
    "DTYPES",
    "ModelOpener",
    "cache_folder",
    "dtype_of",
    "load_config",
    "load_generation_config",
    "load_model",
    "load_tokenizer",
    "locate",
    "pick_device",
]
