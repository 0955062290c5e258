"""Make a student from a teacher.

layers.py, layer_choice.py    fewer layers
vocabulary_transfer.py        another tokenizer
families.py, width.py         narrower layers: what is cut in which family, and how
importance.py, refit.py       what to keep, and what is left refitted to the teacher
sizes.py, search.py           from a wanted size to shapes, and to the best of them
make.py, make_sized.py        a folder with the student
"""

from potstill.students.families import Sizes, sizes_of
from potstill.students.layer_choice import least_missed_layers, most_important_layers
from potstill.students.layers import choose_layers, keep_layers, layer_list, save_student
from potstill.students.make import make_student
from potstill.students.make_sized import SizeWanted, make_sized_student
from potstill.students.search import search_student
from potstill.students.vocabulary_transfer import change_tokenizer, token_sources
from potstill.students.width import Kept, keep_first, narrow

__all__ = [
    "Kept",
    "SizeWanted",
    "Sizes",
    "change_tokenizer",
    "choose_layers",
    "keep_first",
    "keep_layers",
    "layer_list",
    "least_missed_layers",
    "make_sized_student",
    "make_student",
    "most_important_layers",
    "narrow",
    "save_student",
    "search_student",
    "sizes_of",
    "token_sources",
]
