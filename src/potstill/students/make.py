"""A student in a folder of its own: what `potstill student` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from potstill.data import read_conversations
from potstill.data.chat_templates import set_chat_template
from potstill.errors import RunFolderError
from potstill.models import load_config, load_model, load_tokenizer
from potstill.run_folder import whole_folder
from potstill.students.layer_choice import least_missed_layers
from potstill.students.layers import choose_layers, keep_layers, save_student
from potstill.students.vocabulary_transfer import change_tokenizer, refuse_misread, token_sources


def make_student(
    teacher: str,
    output_dir: str,
    *,
    keep: Any = None,
    data: str | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Make a student from ``teacher`` in a new folder: some of its layers, and the tokenizer of another model if one is named.

    ``keep`` is as in `choose_layers`, ``half`` or ``all``; without it half the layers, or all if the tokenizer is changed. With
    ``data`` a number of layers is chosen by how little they are missed on these conversations (`least_missed_layers`).
    Raises: RunFolderError if something is there; ConfigError, ModelError; OpaqueTokenizer and VocabularyMismatch.
    """
    folder = Path(output_dir).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder}: not empty; give another --output-dir")
    keep = keep or ("all" if tokenizer else "half")
    count = load_config(teacher, trust_remote_code=trust_remote_code).get_text_config().num_hidden_layers
    keep = {"half": max(1, count // 2), "all": count}.get(keep, keep) if isinstance(keep, str) else keep
    layers = choose_layers(keep, of=count)
    new_tokenizer = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code) if tokenizer else None
    model, students_tokenizer = load_model(teacher, device="cpu", trust_remote_code=trust_remote_code)
    if data is not None and isinstance(keep, int) and keep < count:
        layers = least_missed_layers(model, students_tokenizer, read_conversations(data), keep)
    student = model if len(layers) == count else keep_layers(model, layers)
    provenance: dict[str, Any] = {"made from": teacher, "layers kept": ", ".join(map(str, layers))}
    if new_tokenizer is not None:
        student, sources = _with_tokenizer(student, students_tokenizer, new_tokenizer)
        provenance |= {"tokenizer": tokenizer, "its rows": sources}
        students_tokenizer = new_tokenizer
    provenance |= {"parameters": f"{student.num_parameters():,}", "state": "cut, not yet trained"}
    with whole_folder(folder) as unfinished:
        save_student(student, students_tokenizer, unfinished, provenance=provenance)
        if new_tokenizer is not None:
            refuse_misread(unfinished, new_tokenizer)
    return folder


def _with_tokenizer(student: Any, tokenizer: Any, new_tokenizer: Any) -> tuple[Any, str]:
    """The student with another tokenizer, and where its rows come from. It talks by the new chat template, or by the plain one."""
    if tokenizer.chat_template and not new_tokenizer.chat_template:
        set_chat_template(new_tokenizer, "plain")
        print("the new tokenizer has no chat template; the student gets the plain one", flush=True)
    sources = token_sources(tokenizer, new_tokenizer)
    changed = change_tokenizer(student, tokenizer, new_tokenizer, sources=sources)
    pieces = [len(ids) for ids in sources]
    kept, mean = sum(count == 1 for count in pieces), sum(count > 1 for count in pieces)
    return changed, f"{kept} of {len(pieces)} are rows of the teacher's, {mean} the mean of several, the rest the mean of all"
