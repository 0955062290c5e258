"""What is wrong with an answer, by name. Each filter looks at one row and says True if the row is to be dropped.

A row is ``{"messages": […, the answer], "cut_off": …, …}``. Filters are tried in order, and the first that says True is the reason.
Duplicates, which are a matter between rows, are found in duplicates.py.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from potstill.errors import ConfigError
from potstill.generation.words import ngrams, words

Row = dict[str, Any]
Filter = Callable[[Row], bool]

LOOP_REPEATS = 4
LOOP_WORDS = 20
CONTAMINATION_WORDS = 8
SCRIPT_SHARE = 0.9

_REFUSAL = re.compile(
    r"\b(i('m| am) (very |so )?sorry,? (but )?(i (can|am (un|not )able|won't|will not|do not|don't)|as an)|i apologi[sz]e,? but i"
    r"|i('m| am) (unable|not able) to|as an (ai|artificial intelligence)( language)?( model| assistant)?,? i\b"
    r"|i (can('|no)t|can not|won't|will not) (help|assist|provide|fulfill?|comply|answer|do that|create|write|generate|discuss)"
    r"|je (suis désolée?,? mais|ne peux pas)|en tant qu'(ia|intelligence)"
    r"|lo siento,? pero|no puedo (ayudar|proporcionar)|como (una )?(ia|inteligencia)"
    r"|es tut mir leid,? aber|ich kann (dir|ihnen) (dabei )?nicht|als (ki|künstliche intelligenz)\b)"
    r"|(对不起|抱歉)，?(但)?我(无法|不能)|作为一个?(ai|人工智能)|申し訳(ありません|ございません)が"
)


def answer(row: Row) -> str:
    """The text that the teacher wrote."""
    text: str = row["messages"][-1]["content"]
    return text


def empty(row: Row) -> bool:
    """Nothing but blanks."""
    return not answer(row).strip()


def cut_off(row: Row) -> bool:
    """The limit of tokens stopped it."""
    return bool(row.get("cut_off"))


def repetition_loop(row: Row) -> bool:
    """Some run of words stands there at least four times in a row, over at least twenty words."""
    said = words(answer(row))
    # A loop repeats three quarters of its trigrams: without that many there is none, and most texts are done with here.
    trigrams = max(0, len(said) - 2)
    if trigrams - len(set(zip(said, said[1:], said[2:], strict=False))) < LOOP_WORDS * 3 // 4 - 2:
        return False
    for period in range(1, len(said) // LOOP_REPEATS + 1):
        needed = max((LOOP_REPEATS - 1) * period, LOOP_WORDS - period)
        same = (one == other for one, other in zip(said, said[period:], strict=False))
        if any(equal and sum(1 for _ in run) >= needed for equal, run in itertools.groupby(same)):
            return True
    return False


def refusal(row: Row) -> bool:
    """It opens like the refusals of instruction-tuned models: in English, and the commonest in a few other languages."""
    return bool(_REFUSAL.search(answer(row)[:200].lower().replace("’", "'")))


def length(minimum: int, maximum: int | None) -> dict[str, Filter]:
    """Fewer characters than ``minimum``, or more than ``maximum``."""
    filters: dict[str, Filter] = {}
    if minimum > 0:
        filters["too_short"] = lambda row: len(answer(row)) < minimum
    if maximum is not None:
        filters["too_long"] = lambda row: len(answer(row)) > maximum
    return filters


def wrong_script(script: str) -> Filter:
    """Less than nine tenths of its letters are of ``script``, named as Unicode's names of letters begin (latin, cyrillic, cjk).

    Raises: ConfigError for a name that no letter begins with.
    """
    prefix = script.upper()
    if not any(unicodedata.name(chr(code), "").startswith(prefix + " ") for code in range(0x41, 0xFFFF)):
        raise ConfigError(
            f"script {script!r}: no letter is named so; Unicode's names are latin, cyrillic, greek, arabic, cjk, hangul, …"
        )
    of_script: dict[str, bool] = {}

    def check(row: Row) -> bool:
        letters = [c for c in answer(row) if c.isalpha()]
        for c in set(letters) - of_script.keys():
            of_script[c] = unicodedata.name(c, "").startswith(prefix)
        return sum(map(of_script.__getitem__, letters)) < SCRIPT_SHARE * len(letters)

    return check


def wrong_language(language: str) -> Filter:
    """The language it is most probably in is not ``language`` (an ISO 639-1 code: en, fr, …), as py3langid sees it.

    Raises: ConfigError if py3langid is not installed or does not know the language.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ConfigError("--language needs the package py3langid: pip install 'potstill[language]'") from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    if language not in identifier.labels:
        raise ConfigError(f"language {language!r} is not known; use a code of ISO 639-1: en, fr, de, es, zh, …")
    return lambda row: identifier.classify(answer(row))[0] != language


def contaminated(held_out: Iterable[str]) -> Filter:
    """Its prompt or its answer shares a run of eight words with a held-out prompt; shorter prompts must be equal."""
    seen = {gram for text in held_out for gram in ngrams(words(text), CONTAMINATION_WORDS)} - {""}

    def check(row: Row) -> bool:
        texts = (m["content"] for m in row["messages"] if m["role"] in ("user", "assistant"))
        return any(not seen.isdisjoint(ngrams(words(text), CONTAMINATION_WORDS)) for text in texts)

    return check


def users_function(place: str) -> Callable[..., Any]:
    """The function that ``FILE.py:NAME`` names. Raises: ConfigError."""
    file, _, name = place.rpartition(":")
    path = Path(file).expanduser()
    if not file.endswith(".py") or not path.is_file():
        raise ConfigError(f"{place}: no such function; name it as FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{place}: cannot be imported; name a function as FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code raises what it likes
        raise ConfigError(f"{path}: cannot be imported ({type(error).__name__}: {error}); mend it") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{path}: has no function {name!r}; name it as FILE.py:FUNCTION")
    return function  # type: ignore[no-any-return]
