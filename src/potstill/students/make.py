"""Make a student and write its folder, for `potstill student`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from potstill.data import read_conversations
from potstill.data.chat_templates import set_chat_template
from potstill.errors import RunFolderError
from potstill.models import load_config, load_model, load_tokenizer
from potstill.models.quantized import refuse_quantized_student
from potstill.processes import print_main
from potstill.protocols import CausalLM, Tokenizer
from potstill.reading import Reading
from potstill.run_folder import whole_folder
from potstill.students.layer_choice import most_important_layers
from potstill.students.layers import choose_layers, keep_layers, save_student
from potstill.students.vocabulary_transfer import change_tokenizer, refuse_misread, token_sources


def make_student(
    teacher: str,
    output_dir: str,
    *,
    keep: Any = None,
    data: str | None = None,
    reading: Reading | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write a student of ``teacher`` to a new folder: fewer layers, or another model's tokenizer.

    ``keep`` is as in `choose_layers`, or ``half`` (the default) or ``all`` (the default with
    ``tokenizer``). With ``data``, `most_important_layers` chooses a number of layers on it.
    Raises: RunFolderError if the folder is not empty; ConfigError, ModelError; OpaqueTokenizer,
    VocabularyMismatch.
    """
    folder = refuse_used_folder(output_dir)
    keep = keep or ("all" if tokenizer else "half")
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = load_config(teacher, **trust)
    count = config.get_text_config().num_hidden_layers
    if isinstance(keep, str):
        keep = {"half": max(1, count // 2), "all": count}.get(keep, keep)
    layers = choose_layers(keep, of=count)
    new_tokenizer = load_tokenizer(tokenizer, **trust) if tokenizer else None
    model, student_tokenizer = load_model(teacher, device="cpu", **trust)
    refuse_quantized_student(teacher, model)
    if data is not None and isinstance(keep, int) and keep < count:
        layers = most_important_layers(
            model, student_tokenizer, read_conversations(data, reading=reading), keep
        )
    student = model if len(layers) == count else keep_layers(model, layers)
    provenance: dict[str, Any] = {"made from": teacher, "layers kept": ", ".join(map(str, layers))}
    if new_tokenizer is not None:
        student, sources = _with_tokenizer(student, student_tokenizer, new_tokenizer)
        provenance |= {"tokenizer": tokenizer, "its rows": sources}
        student_tokenizer = new_tokenizer
    provenance |= {"parameters": f"{student.num_parameters():,}", "state": "cut, not yet trained"}
    with whole_folder(folder) as unfinished:
        save_student(student, student_tokenizer, unfinished, provenance=provenance)
        if new_tokenizer is not None:
            refuse_misread(unfinished, new_tokenizer)
    return folder


def refuse_used_folder(output_dir: str) -> Path:
    """Return the folder's path. Raises: RunFolderError if there is something in it."""
    folder = Path(output_dir).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder}: not empty; give another --output-dir")
    return folder


def _with_tokenizer(
    student: CausalLM, tokenizer: Tokenizer, new_tokenizer: Tokenizer
) -> tuple[Any, str]:
    """Return the student with another tokenizer, and one sentence on the source of its rows."""
    if tokenizer.chat_template and not new_tokenizer.chat_template:
        set_chat_template(new_tokenizer, "plain")
        print_main("the new tokenizer has no chat template; the student gets the plain one")
    sources = token_sources(tokenizer, new_tokenizer)
    changed = change_tokenizer(student, tokenizer, new_tokenizer, sources=sources)
    counts = [len(ids) for ids in sources]
    copied, means = sum(count == 1 for count in counts), sum(count > 1 for count in counts)
    text = f"{copied} of {len(counts)} are rows of the teacher's, {means} the mean of several"
    return changed, f"{text}, the rest the mean of all"
