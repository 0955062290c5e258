"""Run what docs/ shows: each block of Python prints what stands below it, each command parses.

A block of Python that cannot simply run says why in a comment on the line above its fence, which
neither the site nor GitHub shows:

    <!-- slow: REASON -->       it runs in the slow tests
    <!-- not run: REASON -->    it is compiled alone

A block of ``text`` that directly follows is what the program prints.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

import potstill
from potstill import alignment, baselines, cli, losses

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(DOCS)): path.read_text(encoding="utf-8")
    for path in sorted(DOCS.rglob("*.md"))
}
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^:\n]+): [^\n]+ -->\n)?"
    r"^```python\n(?P<program>.+?)^```$"
    r"(?:\n\n?```text\n(?P<output>.+?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
MARKS = {None, "slow", "not run"}


def blocks(*marks: str | None) -> list[object]:
    """The blocks so marked, as parameters named by page and line."""
    return [
        pytest.param(
            match["program"],
            match["output"],
            id=f"{page}:{text.count(chr(10), 0, match.start('program'))}",
        )
        for page, text in PAGES.items()
        for match in BLOCK.finditer(text)
        if match["mark"] in marks
    ]


def commands(program: str) -> list[tuple[str, str]]:
    """Return each line of bash and indented code that begins with this command, and its page."""
    code = {
        page: [*re.findall(r"^ {4}(.+)$", text, re.MULTILINE), *bash_lines(text)]
        for page, text in PAGES.items()
    }
    return [
        (page, line)
        for page, lines in code.items()
        for line in lines
        if line.startswith(f"{program} ")
    ]


def bash_lines(text: str) -> list[str]:
    return [
        line
        for fence in re.findall(r"^```bash\n(.+?)^```$", text, re.MULTILINE | re.DOTALL)
        for line in fence.splitlines()
    ]


def run(program: str, output: str | None, printed: pytest.CaptureFixture[str]) -> None:
    exec(compile(program, "docs", "exec"), {"__name__": "__main__"})
    if output is not None:
        assert printed.readouterr().out == output


@pytest.mark.parametrize(("program", "output"), blocks(None))
def test_a_block_of_python_runs_and_prints_what_the_page_says(
    program: str, output: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    run(program, output, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("program", "output"), blocks("slow"))
def test_a_slow_block_of_python_runs(
    program: str,
    output: str | None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run(program, output, capsys)


def test_every_fence_of_python_is_a_block_and_its_mark_is_known() -> None:
    found = [match for text in PAGES.values() for match in BLOCK.finditer(text)]
    assert len(found) == sum(text.count("```python") for text in PAGES.values())
    assert {match["mark"] for match in found} <= MARKS
    for match in found:
        compile(match["program"], "docs", "exec")


@pytest.mark.parametrize(("page", "command"), commands("potstill"))
def test_a_command_in_the_pages_parses(page: str, command: str) -> None:
    cli.parse(shlex.split(command, comments=True)[1:])


def test_every_script_and_make_target_in_the_pages_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page, command in commands("python"):
        assert (ROOT / command.split()[1]).is_file(), page
    for page, command in commands("make"):
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), page


@pytest.mark.parametrize("module", [losses, alignment, baselines])
def test_every_public_name_stands_in_the_reference(module: object) -> None:
    name = module.__name__  # type: ignore[attr-defined]
    page = PAGES[f"api/{name.rpartition('.')[2]}.md"]
    described = set(re.findall(rf"^::: {re.escape(name)}[.\w]*\.(\w+)$", page, re.MULTILINE))
    names = set(module.__all__)  # type: ignore[attr-defined]
    assert described == names - {"DIVERGENCES"}  # whose entries are described one by one


def test_every_name_of_the_package_itself_stands_in_the_reference() -> None:
    described = set(re.findall(r"^::: potstill\.(\w+)$", PAGES["api/training.md"], re.MULTILINE))
    assert described == set(potstill.__all__) - {
        "alignment",
        "losses",
    }  # which have pages of their own


def test_the_reference_lists_every_field_of_the_configuration_with_its_default() -> None:
    from transformers import TrainingArguments

    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    listed = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \|", PAGES["api/training.md"], re.MULTILINE))
    ours = [
        field
        for field in dataclasses.fields(potstill.DistillationConfig)
        if field.name not in inherited
    ]
    assert listed == {
        field.name: str(field.default)
        if not isinstance(field.default, str)
        else f'"{field.default}"'
        for field in ours
    }
