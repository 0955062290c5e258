"""From arguments and YAML files to a command's recipe."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import docstring_parser
import yaml
from jsonargparse import ArgumentParser

from potstill.commands import COMMANDS, SUMMARIES
from potstill.errors import ConfigError
from potstill.reading import Reading


def parse(arguments: list[str]) -> tuple[str, Any]:
    """Return the command and its recipe. Flags override the YAML file.

    Raises: ConfigError; SystemExit after ``--help`` and ``--version``.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        raise SystemExit(0)
    if arguments[0] == "--version":
        from potstill import __version__

        print(f"potstill {__version__}")
        raise SystemExit(0)
    command, *rest = arguments
    if command not in COMMANDS:
        raise ConfigError(
            f"no command {command!r}{_nearest(command, COMMANDS)}; "
            f"commands are {', '.join(COMMANDS)}"
        )
    recipe, positional = recipe_of(command), COMMANDS[command]
    parser = _Parser(
        prog=f"potstill {command}",
        usage=_usage(command, recipe, positional),
        description=recipe.__doc__,
    )
    _add_fields(parser, recipe)
    flags = _with_yaml(_flags_for_positionals(rest, positional), recipe)
    given = parser.parse_args(flags).as_dict()
    given.pop("print_config", None)
    given = _with_divergence_parameters(given, recipe)
    missing = [
        item.name
        for item in dataclasses.fields(recipe)
        if _required(item) and given.get(item.name) is None
    ]
    if missing:
        spelled = ", ".join(name.upper() if name in positional else _flag(name) for name in missing)
        raise ConfigError(f"{command} needs {spelled}; potstill {command} --help shows all")
    return command, recipe(**given)


def recipe_of(command: str) -> Any:
    """Return the recipe class of a command, importing its module."""
    return getattr(command_module(command), f"{command.capitalize()}Recipe")


def command_module(command: str) -> Any:
    return importlib.import_module(f"potstill.commands.{command}")


class _Parser(ArgumentParser):
    """Raise argparse's errors as ConfigError, naming the flag that was probably meant."""

    def error(self, message: str, *_: Any, **__: Any) -> NoReturn:
        line = " ".join(message.split())
        flags = (word for word in line.split() if word.startswith("--"))
        unknown = next(flags, "").split("=")[0]
        hint = _nearest(unknown, self._option_string_actions) if "nrecognized" in line else ""
        raise ConfigError(f"{line}{hint}; {self.prog} --help shows all")


def _add_fields(parser: ArgumentParser, recipe: Any) -> None:
    documented = (docstring_parser.parse_from_object(one) for one in reversed(recipe.__mro__[:-1]))
    help_of = {item.arg_name: item.description or "" for one in documented for item in one.params}
    types = typing.get_type_hints(recipe)
    for item in _fields(recipe):
        text = help_of[item.name]
        default = None if item.default is dataclasses.MISSING else item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        if types[item.name] is bool:
            parser.add_argument(_flag(item.name), action="store_true", help=text)
            continue
        if "{DIVERGENCES}" in text:
            text = text.replace("{DIVERGENCES}", ", ".join(_divergences()))
        kind = types[item.name] | None if _required(item) else types[item.name]
        parser.add_argument(_flag(item.name), type=kind, default=default, help=text)
        if item.name == "divergence_parameters":
            for name, (value, about) in _divergence_parameters().items():
                about = f"{about} (default: {value})"
                parser.add_argument(_flag(name), type=float | None, default=None, help=about)


def _fields(recipe: Any) -> list[dataclasses.Field[Any]]:
    """Return the fields, those of `Reading` last."""
    inherited = {item.name for item in dataclasses.fields(Reading)}
    return sorted(dataclasses.fields(recipe), key=lambda item: item.name in inherited)


def _divergences() -> Iterable[str]:
    from potstill.losses import DIVERGENCES

    return DIVERGENCES


def _divergence_parameters() -> dict[str, tuple[float, str]]:
    from potstill.losses.records import all_parameters

    return {name: (one.default, one.help) for name, one in all_parameters().items()}


def _with_divergence_parameters(given: dict[str, Any], recipe: Any) -> dict[str, Any]:
    """Move ``--skew 0.2`` and its kind into ``divergence_parameters``."""
    names = {item.name for item in dataclasses.fields(recipe)}
    if "divergence_parameters" not in names:
        return given
    flags = {name: given.pop(name) for name in list(given) if name not in names}
    chosen = {name: value for name, value in flags.items() if value is not None}
    return {**given, "divergence_parameters": {**given["divergence_parameters"], **chosen}}


def _with_yaml(flags: list[str], recipe: Any) -> list[str]:
    """Replace ``--config FILE`` by the flags it stands for, first, so that other flags override."""
    flags = [
        part
        for flag in flags
        for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])
    ]
    if "--config" not in flags:
        return flags
    at = flags.index("--config")
    if at + 1 == len(flags):
        raise ConfigError("--config needs the name of a YAML file")
    path = Path(flags[at + 1]).expanduser()
    known = [item.name for item in dataclasses.fields(recipe)]
    if "divergence_parameters" in known:
        known += _divergence_parameters()
    spelled: list[str] = []
    for key, value in _read_yaml(path).items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(
                f"{path}: no setting {key!r}{_nearest(name, known)}; known are {', '.join(known)}"
            )
        if value is True:
            spelled.append(_flag(name))
        elif value is not None and value is not False:
            text = json.dumps(value) if isinstance(value, dict | list) else value
            spelled.append(f"{_flag(name)}={text}")
    return [*spelled, *flags[:at], *flags[at + 2 :]]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"{path}: not YAML ({reason})") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: must hold settings as `name: value`, one a line")
    return settings


def _flags_for_positionals(arguments: list[str], positional: tuple[str, ...]) -> list[str]:
    """Turn ``TEACHER STUDENT --data F`` into ``--teacher=TEACHER --student=STUDENT --data F``."""
    starts = (i for i, argument in enumerate(arguments) if argument.startswith("-"))
    count = next(starts, len(arguments))
    words, rest = arguments[:count], arguments[count:]
    if len(words) > len(positional):
        raise ConfigError(
            f"{words[len(positional)]!r} is one argument too many; "
            f"expected {', '.join(positional).upper() or 'flags only'}"
        )
    named = zip(positional, words, strict=False)
    return [*(f"{_flag(name)}={word}" for name, word in named), *rest]


def _usage(command: str, recipe: Any, positional: tuple[str, ...]) -> str:
    required = [
        item.name
        for item in dataclasses.fields(recipe)
        if _required(item) and item.name not in positional
    ]
    words = [name.upper() for name in positional]
    words += [f"{_flag(name)} {name.upper()}" for name in required]
    return " ".join(["potstill", command, *words, "[--config FILE] [options]"])


def _overview() -> str:
    lines = [f"  {name:<10}{summary}" for name, summary in SUMMARIES.items()]
    last = "potstill COMMAND --help lists the options of a command."
    return "\n".join(["usage: potstill COMMAND …", "", *lines, "", last])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""
