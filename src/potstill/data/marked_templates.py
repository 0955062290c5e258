"""Render a chat template, and say which part of the text it wrote for which message.

A chat template is a program; its output alone does not show where a message is. The compiled
template is therefore changed: a loop writes a mark before each item, and one after the loop. The
mark is empty unless the item is one of the messages. Removing the marks from the output gives the
text of the unchanged template and the place of each message, in one rendering.
``{% generation %}`` blocks, with which a template marks the assistant's text, get marks as well.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import secrets
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Span = tuple[int, int]

_NONCE = secrets.token_hex(12)  # no text contains it
_MARK = re.compile(rf"<{_NONCE}:(\w+):(-?\d+)>")
_END, _GENERATION = -1, "generation"


@dataclass
class MarkedText:
    """The output of a template."""

    text: str
    written: dict[int, Span] = field(default_factory=dict)
    """What was written in the iteration of a message, by the message's number; messages without
    text, or with text in several places, are absent."""
    generation: list[Span] = field(default_factory=list)
    """The ``{% generation %}`` blocks."""


def render_marked(
    template: str,
    messages: list[dict[str, Any]],
    *,
    today: datetime.date | None = None,
    **variables: Any,
) -> MarkedText:
    """Render a template with its messages; ``today`` is the date that `strftime_now` formats.

    Raises: the exceptions of the template and of jinja2.
    """
    numbers = {id(message): number for number, message in enumerate(messages)}

    def enter(loop: int, item: Any) -> str:
        number = numbers.get(id(item))
        return "" if number is None else _mark(loop, number)

    def strftime_now(form: str) -> str:
        now = datetime.datetime.now()
        return (datetime.datetime.combine(today, now.time()) if today else now).strftime(form)

    output = _compiled(template).render(
        messages=messages, _enter=enter, _leave=_leave, strftime_now=strftime_now, **variables
    )
    return _without_marks(output)


def _without_marks(output: str) -> MarkedText:
    pieces: list[str] = []
    length = position = 0
    marks: list[tuple[str, int, int]] = []
    for found in _MARK.finditer(output):
        pieces.append(output[position : found.start()])
        length += len(pieces[-1])
        position = found.end()
        marks.append((found[1], int(found[2]), length))
    pieces.append(output[position:])
    marked = MarkedText("".join(pieces))
    open_marks: dict[str, tuple[int, int]] = {}
    places: dict[int, list[Span]] = defaultdict(list)
    for loop, number, place in marks:
        if loop in open_marks:
            item, start = open_marks.pop(loop)
            if place > start or loop == _GENERATION:
                target = marked.generation if loop == _GENERATION else places[item]
                target.append((start, place))
        if number != _END:
            open_marks[loop] = number, place
    marked.written = {number: found[0] for number, found in places.items() if len(found) == 1}
    return marked


def _mark(loop: int | str, number: int) -> str:
    return f"<{_NONCE}:{loop}:{number}>"


def _leave(loop: int | str) -> str:
    return _mark(loop, _END)


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> Template:
    environment = _environment()
    tree = environment.parse(template)
    loops = list(tree.find_all(nodes.For))
    for number, loop in enumerate(loops):
        names = [loop.target, *loop.target.find_all(nodes.Name)]
        items = {node.name for node in names if isinstance(node, nodes.Name)}
        loop.body[:0] = [
            _call("_enter", nodes.Const(number), _name(item)) for item in sorted(items)
        ]
    _close_loops(tree, {id(loop): number for number, loop in enumerate(loops)})
    tree.set_environment(environment)
    code = environment.compile(tree)
    made: Template = environment.template_class.from_code(
        environment, code, environment.make_globals(None)
    )
    return made


def _close_loops(node: nodes.Node, numbers: dict[int, int]) -> None:
    """Put an end mark after each loop."""
    for name, value in list(node.iter_fields()):
        if isinstance(value, list):
            closed = []
            for item in value:
                closed.append(item)
                if id(item) in numbers:
                    closed.append(_call("_leave", nodes.Const(numbers[id(item)])))
            setattr(node, name, closed)
    for child in node.iter_child_nodes():
        _close_loops(child, numbers)


def _call(function: str, *arguments: nodes.Expr) -> nodes.Output:
    """Return a statement that writes what a function returns."""
    return nodes.Output([nodes.Call(_name(function), list(arguments), [], None, None)])


def _name(name: str) -> nodes.Name:
    return nodes.Name(name, "load")


class _GenerationBlocks(Extension):
    """Mark what ``{% generation %}`` blocks write."""

    tags = {_GENERATION}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        mark, end = (
            nodes.TemplateData(_mark(_GENERATION, 0)),
            nodes.TemplateData(_leave(_GENERATION)),
        )
        marked = [nodes.Output([mark]), *body, nodes.Output([end])]
        return nodes.Scope(marked).set_lineno(line)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Return an environment with what transformers gives to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
