"""A student made from a teacher: some of its layers (layers.py), chosen by how little they are missed (layer_choice.py), another
tokenizer (vocabulary_transfer.py), and all of it into a folder (make.py)."""

from potstill.students.layer_choice import least_missed_layers
from potstill.students.layers import choose_layers, keep_layers, layer_list, save_student
from potstill.students.make import make_student
from potstill.students.vocabulary_transfer import change_tokenizer, token_sources

__all__ = [
    "change_tokenizer",
    "choose_layers",
    "keep_layers",
    "layer_list",
    "least_missed_layers",
    "make_student",
    "save_student",
    "token_sources",
]
