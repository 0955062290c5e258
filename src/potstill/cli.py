"""The command line: parse, call the pipeline, print. `potstill --help`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import docstring_parser
import yaml
from jsonargparse import ArgumentParser

from potstill import config
from potstill.errors import ConfigError, PotstillError
from potstill.processes import process_count

RECIPES: dict[str, tuple[type, tuple[str, ...]]] = {
    "demo": (config.DemoRecipe, ()),
    "doctor": (config.DoctorRecipe, ("teacher", "student")),
    "student": (config.StudentRecipe, ("teacher",)),
    "generate": (config.GenerateRecipe, ("teacher",)),
    "distill": (config.DistillRecipe, ("teacher", "student")),
    "compare": (config.CompareRecipe, ("teacher", "student")),
    "evaluate": (config.EvaluateRecipe, ("student",)),
    "report": (config.ReportRecipe, ("run_dir",)),
    "play": (config.PlayRecipe, ("run_dir",)),
}
"""What each command takes, and which of it stands without a flag."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 done, 2 something the user can mend, 130 interrupted."""
    try:
        command, recipe = parse(list(sys.argv[1:] if arguments is None else arguments))
        _refuse_several_processes(command)
        COMMANDS[command](recipe)
        return 0
    except PotstillError as error:
        print(f"potstill: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; torch itself is opened only by those who need it
            raise
        said = " ".join(str(error).split())[:120]
        hint = "lower --batch-size and raise --gradient-accumulation-steps as much, or take a smaller --max-length"
        print(f"potstill: the device's memory is full ({said}); {hint}; what is finished is kept", file=sys.stderr)
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"potstill: {place}{error.strerror or error}; free space or choose another folder", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npotstill: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def _refuse_several_processes(command: str) -> None:
    if process_count() > 1 and command != "distill":
        raise ConfigError(f"{command} runs in one process, and {process_count()} were started; leave torchrun or accelerate away")


def parse(arguments: list[str]) -> tuple[str, Any]:
    """The command and its recipe. Flags override the YAML file. Raises: ConfigError; SystemExit after ``--help``."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        raise SystemExit(0)
    if arguments[0] == "--version":
        print(_version())
        raise SystemExit(0)
    command, *rest = arguments
    if command not in RECIPES:
        raise ConfigError(f"no command {command!r}{_nearest(command, RECIPES)}; commands are {', '.join(RECIPES)}")
    recipe, positional = RECIPES[command]
    parser = _Parser(prog=f"potstill {command}", usage=_usage(command, recipe, positional), description=recipe.__doc__)
    _add_fields(parser, recipe)
    given = parser.parse_args(_with_yaml(_flags_for_positionals(rest, positional), recipe)).as_dict()
    given.pop("print_config", None)
    missing = [item.name for item in dataclasses.fields(recipe) if _required(item) and given.get(item.name) is None]
    if missing:
        spelled = ", ".join(name.upper() if name in positional else _flag(name) for name in missing)
        raise ConfigError(f"{command} needs {spelled}; potstill {command} --help shows all")
    return command, recipe(**given)


class _Parser(ArgumentParser):
    """argparse's errors as ours, naming the flag that was probably meant."""

    def error(self, message: str, *_: Any, **__: Any) -> NoReturn:
        line = " ".join(message.split())
        unknown = next((word for word in line.split() if word.startswith("--")), "").split("=")[0]
        hint = _nearest(unknown, self._option_string_actions) if "nrecognized" in line else ""
        raise ConfigError(f"{line}{hint}; {self.prog} --help shows all")


def _add_fields(parser: ArgumentParser, recipe: type) -> None:
    inherited = (docstring_parser.parse_from_object(one).params for one in reversed(recipe.__mro__[:-1]))
    help_of = {item.arg_name: item.description for params in inherited for item in params}
    types = typing.get_type_hints(recipe)
    for item in dataclasses.fields(recipe):
        default = None if item.default is dataclasses.MISSING else item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        if types[item.name] is bool:
            parser.add_argument(_flag(item.name), action="store_true", help=help_of[item.name])
            continue
        kind = types[item.name] | None if _required(item) else types[item.name]
        parser.add_argument(_flag(item.name), type=kind, default=default, help=help_of[item.name])


def _with_yaml(flags: list[str], recipe: type) -> list[str]:
    """``--config FILE`` replaced by the flags it stands for, in front, so that flags given by hand override them."""
    flags = [part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
    if "--config" not in flags:
        return flags
    at = flags.index("--config")
    if at + 1 == len(flags):
        raise ConfigError("--config needs the name of a YAML file")
    path = Path(flags[at + 1]).expanduser()
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: must hold settings as `name: value`, one a line")
    known = [item.name for item in dataclasses.fields(recipe)]
    spelled: list[str] = []
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"{path}: no setting {key!r}{_nearest(name, known)}; known are {', '.join(known)}")
        if value is True:
            spelled.append(_flag(name))
        elif value is not None and value is not False:
            spelled.append(f"{_flag(name)}={json.dumps(value) if isinstance(value, dict | list) else value}")
    return [*spelled, *flags[:at], *flags[at + 2 :]]


def _flags_for_positionals(arguments: list[str], positional: tuple[str, ...]) -> list[str]:
    """``TEACHER STUDENT --data F`` → ``--teacher=TEACHER --student=STUDENT --data F``."""
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    words, rest = arguments[:count], arguments[count:]
    if len(words) > len(positional):
        raise ConfigError(
            f"{words[len(positional)]!r} is one argument too many; expected {', '.join(positional).upper() or 'flags only'}"
        )
    return [*(f"{_flag(name)}={word}" for name, word in zip(positional, words, strict=False)), *rest]


def _usage(command: str, recipe: type, positional: tuple[str, ...]) -> str:
    required = [item.name for item in dataclasses.fields(recipe) if _required(item) and item.name not in positional]
    words = [name.upper() for name in positional] + [f"{_flag(name)} {name.upper()}" for name in required]
    return " ".join(["potstill", command, *words, "[--config FILE] [options]"])


def _overview() -> str:
    lines = [f"  {name:<10}{(recipe.__doc__ or '').splitlines()[0]}" for name, (recipe, _) in RECIPES.items()]
    return "\n".join(["usage: potstill COMMAND …", "", *lines, "", "potstill COMMAND --help shows what a command takes."])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _nearest(word: str, known: Any) -> str:
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""


def _version() -> str:
    from potstill import __version__

    return f"potstill {__version__}"


def _demo(recipe: config.DemoRecipe) -> None:
    from potstill.demo import demo

    demo(recipe.output_dir, seconds=recipe.seconds)


def _student(recipe: config.StudentRecipe) -> None:
    from potstill.students import make_student

    folder = make_student(
        recipe.teacher,
        recipe.output_dir,
        keep=_layers(recipe.keep_layers),
        data=recipe.data,
        tokenizer=recipe.tokenizer,
        trust_remote_code=recipe.trust_remote_code,
    )
    print(f"student: {folder}")


def _layers(text: str | None) -> Any:
    if text in (None, "half", "all"):
        return text
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--keep-layers {text}: give a number (8), a list (0,1,5,9), half or all") from None
    return numbers if "," in text else numbers[0]


def _doctor(recipe: config.DoctorRecipe) -> None:
    from potstill.doctor import as_text, examine

    settings = dataclasses.asdict(recipe)
    as_json = settings.pop("json")
    diagnosis = examine(**settings)
    print(json.dumps(diagnosis.as_dict(), indent=1, ensure_ascii=False) if as_json else as_text(diagnosis))


def _generate(recipe: config.GenerateRecipe) -> None:
    from potstill import teacher_text

    print(f"data: {teacher_text.generate(recipe)}")


def _distill(recipe: config.DistillRecipe) -> None:
    from potstill import pipeline

    pipeline.distill(recipe)


def _compare(recipe: config.CompareRecipe) -> None:
    from potstill.compare import compare, listed
    from potstill.comparison import as_text

    files = listed(recipe.recipes)
    recipes = {Path(file).stem: parse(["distill", "--config", file])[1] for file in files}
    if files and len(recipes) < max(2, len(files)):
        raise ConfigError(f"--recipes {recipe.recipes}: give two or more files of different names")
    comparison = compare(recipe, recipes)
    print(f"\n{as_text(comparison)}\n\npage: {Path(recipe.output_dir).expanduser() / 'comparison.html'}")


def _evaluate(recipe: config.EvaluateRecipe) -> None:
    from potstill import pipeline
    from potstill.evaluation import as_table

    measured = pipeline.evaluate(recipe)
    print(json.dumps(measured, indent=1) if recipe.json else as_table(measured))


def _report(recipe: config.ReportRecipe) -> None:
    from potstill.report import write_report

    print(f"report: {write_report(Path(recipe.run_dir).expanduser())}")


def _play(recipe: config.PlayRecipe) -> None:
    from potstill.play.serve import play

    play(recipe.run_dir, host=recipe.host, port=recipe.port, device=recipe.device)


COMMANDS: dict[str, Callable[[Any], None]] = {
    "demo": _demo,
    "doctor": _doctor,
    "student": _student,
    "generate": _generate,
    "distill": _distill,
    "compare": _compare,
    "evaluate": _evaluate,
    "report": _report,
    "play": _play,
}
