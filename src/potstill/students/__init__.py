"""Make a student from a teacher: fewer layers (layers.py, layer_choice.py), another tokenizer
(vocabulary_transfer.py), and a folder with both (make.py)."""

from potstill.students.layer_choice import least_missed_layers, most_important_layers
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
    "most_important_layers",
    "save_student",
    "token_sources",
]
