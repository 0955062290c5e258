"""Filter answers: a filter takes one row and returns True if the row is to be dropped.

A row is ``{"messages": […, the answer], "cut_off": …, …}``. The first filter that returns True is
the reason. Duplicates need several rows and are found by data/duplicates.py.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from potstill.data.words import ngrams, words
from potstill.errors import ConfigError

Row = dict[str, Any]
Filter = Callable[[Row], bool]

LOOP_REPEATS = 4
LOOP_WORDS = 20
CONTAMINATION_WORDS = 8
SCRIPT_SHARE = 0.9

_REFUSAL = re.compile(
    r"\b(i('m| am) (very |so )?sorry,? (but )?"
    r"(i (can|am (un|not )able|won't|will not|do not|don't)|as an)|i apologi[sz]e,? but i"
    r"|i('m| am) (unable|not able) to"
    r"|as an (ai|artificial intelligence)( language)?( model| assistant)?,? i\b"
    r"|i (can('|no)t|can not|won't|will not) "
    r"(help|assist|provide|fulfill?|comply|answer|do that|create|write|generate|discuss)"
    r"|je (suis désolée?,? mais|ne peux pas)|en tant qu'(ia|intelligence)"
    r"|lo siento,? pero|no puedo (ayudar|proporcionar)|como (una )?(ia|inteligencia)"
    r"|es tut mir leid,? aber|ich kann (dir|ihnen) (dabei )?nicht"
    r"|als (ki|künstliche intelligenz)\b)"
    r"|(对不起|抱歉)，?(但)?我(无法|不能)|作为一个?(ai|人工智能)|申し訳(ありません|ございません)が"
)


def answer(row: Row) -> str:
    """Return the teacher's answer."""
    text: str = row["messages"][-1]["content"]
    return text


def empty(row: Row) -> bool:
    """Return whether the answer is only white space."""
    return not answer(row).strip()


def cut_off(row: Row) -> bool:
    """Return whether the token limit stopped the answer."""
    return bool(row.get("cut_off"))


def repetition_loop(row: Row) -> bool:
    """Return whether a run of words occurs four times or more in a row, over at least 20 words."""
    text = words(answer(row))
    # A loop repeats three quarters of its trigrams. This fast check is enough for most texts.
    trigrams = max(0, len(text) - 2)
    if trigrams - len(set(zip(text, text[1:], text[2:], strict=False))) < LOOP_WORDS * 3 // 4 - 2:
        return False
    for period in range(1, len(text) // LOOP_REPEATS + 1):
        needed = max((LOOP_REPEATS - 1) * period, LOOP_WORDS - period)
        same = (word == later for word, later in zip(text, text[period:], strict=False))
        if any(equal and sum(1 for _ in run) >= needed for equal, run in itertools.groupby(same)):
            return True
    return False


def refusal(row: Row) -> bool:
    """Return whether the answer starts like a refusal, in English or a few other languages."""
    return bool(_REFUSAL.search(answer(row)[:200].lower().replace("’", "'")))


def length(minimum: int, maximum: int | None) -> dict[str, Filter]:
    """Return filters for fewer characters than `minimum` and more than `maximum`."""
    filters: dict[str, Filter] = {}
    if minimum > 0:
        filters["too_short"] = lambda row: len(answer(row)) < minimum
    if maximum is not None:
        filters["too_long"] = lambda row: len(answer(row)) > maximum
    return filters


def wrong_script(script: str) -> Filter:
    """Return a filter for answers with less than 90 % of their letters in `script`.

    `script` is the start of the letters' Unicode names: latin, cyrillic, cjk, …
    Raises: ConfigError if no letter has such a name.
    """
    prefix = script.upper()
    names = (unicodedata.name(chr(code), "") for code in range(0x41, 0xFFFF))
    if not any(name.startswith(prefix + " ") for name in names):
        raise ConfigError(
            f"script {script!r} is unknown; use latin, cyrillic, greek, arabic, cjk, …"
        )
    in_script: dict[str, bool] = {}

    def check(row: Row) -> bool:
        letters = [c for c in answer(row) if c.isalpha()]
        for c in set(letters) - in_script.keys():
            in_script[c] = unicodedata.name(c, "").startswith(prefix)
        return sum(map(in_script.__getitem__, letters)) < SCRIPT_SHARE * len(letters)

    return check


def wrong_language(language: str) -> Filter:
    """Return a filter for answers that py3langid does not recognize as `language` (ISO 639-1).

    Raises: ConfigError if py3langid is not installed or does not know the language.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        message = "--language needs the package py3langid: pip install 'potstill[language]'"
        raise ConfigError(message) from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    if language not in identifier.labels:
        raise ConfigError(f"language {language!r} is unknown; use an ISO 639-1 code: en, fr, zh, …")
    return lambda row: identifier.classify(answer(row))[0] != language


def contaminated(held_out: Iterable[str]) -> Filter:
    """Return a filter for rows that share eight words in a row with a held-out prompt.

    A held-out prompt of fewer words must be equal to the prompt or the answer.
    """
    seen = {gram for text in held_out for gram in ngrams(words(text), CONTAMINATION_WORDS)} - {""}

    def check(row: Row) -> bool:
        texts = (m["content"] for m in row["messages"] if m["role"] in ("user", "assistant"))
        return any(not seen.isdisjoint(ngrams(words(text), CONTAMINATION_WORDS)) for text in texts)

    return check


def users_function(place: str) -> Callable[..., Any]:
    """Return the function named by `place`, as ``FILE.py:NAME``. Raises: ConfigError."""
    file, _, name = place.rpartition(":")
    path = Path(file).expanduser()
    if not file.endswith(".py") or not path.is_file():
        raise ConfigError(f"{place}: no such function; use the form FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{place}: cannot be imported; use the form FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code can raise anything
        message = f"{path}: cannot be imported ({type(error).__name__}: {error}); correct it"
        raise ConfigError(message) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{path}: has no function {name!r}; use the form FILE.py:FUNCTION")
    return function  # type: ignore[no-any-return]
