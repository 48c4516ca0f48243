"""Tests that the code of README and the how-to pages runs, or that the page says why it does not.

HTML comments before a block control this test: `not run: REASON` skips the block, `before: CODE` is
run first, and `replace: TEXT -> TEXT` shortens the block for the test. The tutorials run when the
site is built.
"""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from avb_tf import command_line, configuration

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs/howto").glob("*.md"))]
BLOCK = re.compile(
    r"(?P<notes>(?:^<!-- [^\n]* -->\n)*)^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S
)
UNRUN = ("yaml", "text", "{toctree}")  # these need no reason, because they are not commands


class Block(NamedTuple):
    language: str
    code: str
    notes: dict[str, list[str]]


def blocks(page):
    for match in BLOCK.finditer(page.read_text()):
        notes = {}
        for key, value in re.findall(r"^<!-- ([\w ]+): (.*) -->$", match["notes"], re.M):
            notes.setdefault(key, []).append(value)
        yield Block(match["language"], match["code"], notes)


def run_here(page, language):
    return [b for b in blocks(page) if b.language == language and "not run" not in b.notes]


def shortened(block):
    code = "\n".join([*block.notes.get("before", []), block.code])
    for note in block.notes.get("replace", []):
        text, replacement = note.split(" -> ")
        assert text in code, f"{text!r} is no longer in the block"
        code = code.replace(text, replacement)
    return code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_run_or_says_why_not(page):
    for block in blocks(page):
        known = block.language in ("python", "sh", *UNRUN)
        assert known, f"```{block.language} of {block.code[:60]!r}: python, sh or another known one"
        assert all(block.notes.get("not run", ["a reason"])), "a reason"
        assert block.notes.keys() <= {"not run", "before", "replace"}


WITH_PYTHON = [page for page in PAGES if run_here(page, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python_blocks_run_one_after_another(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in run_here(page, "python"):
        exec(compile(shortened(block), f"{page.name}", "exec"), names)


WITH_SHELL = [page for page in PAGES if run_here(page, "sh")]


@pytest.mark.parametrize("page", WITH_SHELL, ids=lambda page: page.stem)
def test_commands_are_understood(page, tmp_path, monkeypatch):
    """Parses the flags, the experiment and the mode of every line, without running the mode."""
    monkeypatch.chdir(tmp_path)
    called = []
    mode = SimpleNamespace()
    monkeypatch.setattr(command_line, "_imported", lambda module: mode)
    for name in {entry.split(":")[1] for entry in all_modes()}:
        setattr(mode, name, lambda *arguments, name=name: called.append((name, arguments)))
    lines = "\n".join(block.code for block in run_here(page, "sh")).replace("\\\n", " ")
    for line in lines.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "avb-tf", f"{line!r} is no command of this program: mark the block"
        count = len(called)
        command_line.main(words)
        assert len(called) == count + 1
        config, workdir = called[-1][1]
        if config is not None:
            configuration.save(config, workdir)  # for the commands that only name the workdir


def all_modes():
    modes = (command_line.MODES, command_line.POSTERIOR_MODES, command_line.AMORTISED_MODES)
    return [entry for one in modes for entry in one.values()]
