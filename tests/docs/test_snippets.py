"""Every program and command that a page shows is run, in one Squall, and what the page says it prints is compared.

A Python block whose first line is `# name.py` is that file; the page's console blocks run in the same directory, and a
program that none of them runs is run by itself. `...` in shown output stands for anything. A block that is not run has
`<!-- not run: reason -->` above it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Debian
from tests.docs.markdown import PAGES, ROOT, Block, blocks

SECONDS = 300
PRELUDE = 'import squall\n\napp = squall.App("example")\n'
SHOWN = [page for page in PAGES if any(block.kind in ("python", "console") for block in blocks(page.read_text()))]
REFERENCE = ROOT / "docs/reference/sdk.md"
_FAILS = re.compile(r"^(error: |Traceback )", re.MULTILINE)


@pytest.fixture(scope="module")
def environment(shared_home: Path, debian_layers: Debian) -> dict[str, str]:
    """Where `squall` and `python` are those that run this test."""
    tools = shared_home / "bin"
    tools.mkdir()
    for name, words in (("squall", " -m squall.cli"), ("python", "")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n')
        (tools / name).chmod(0o755)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    found = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": path, "TERM": "dumb"}
    if json.loads(run("squall doctor --json", shared_home, found)[1])["runtime"] != "native":
        pytest.skip("the pages show what is printed where containers can be made, and here they cannot")
    debian_layers.lend(shared_home)
    return found


def name_of(block: Block) -> str:
    found = re.match(r"# (\w+\.py)\n", block.body)
    return found[1] if found else ""


def commands_of(block: Block) -> list[tuple[str, str]]:
    """Each `$ command` with the output shown below it."""
    parts = re.split(r"^\$ (.*)\n", block.body, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def matches(expected: str, actual: str) -> bool:
    pattern = ".*".join(re.escape(part.strip("\n")) for part in expected.split("..."))
    tidy = "\n".join(line.rstrip() for line in actual.strip("\n").splitlines())
    return re.fullmatch(pattern, tidy, re.DOTALL) is not None


def run(command: str, directory: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and all that the command writes, as it shows on a terminal."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.returncode, done.stdout


def check(command: str, expected: str, directory: Path, environment: dict[str, str]) -> None:
    code, output = run(command, directory, environment)
    as_shown = (code != 0) == bool(_FAILS.search(expected)) and (not expected.strip() or matches(expected, output))
    if not as_shown:
        pytest.fail(f"$ {command}\n{output}exit code {code}; the page shows:\n{expected}", pytrace=False)


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_that_are_not_run_say_why(page: Path) -> None:
    silent = [
        block.body
        for block in blocks(page.read_text())
        if block.kind == "python" and not block.not_run and not name_of(block) and page != REFERENCE
    ]
    assert silent == [], 'begin them with "# name.py", or put `<!-- not run: reason -->` above them'


@pytest.mark.parametrize("page", [p for p in SHOWN if p != REFERENCE], ids=lambda page: str(page.relative_to(ROOT)))
def test_page_shows_what_happens(page: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    shown = [block for block in blocks(page.read_text()) if not block.not_run]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    told = "\n".join(block.body for block in shown if block.kind == "console")
    for block in shown:
        if block.kind == "console":
            for command, expected in commands_of(block):
                check(command, expected, tmp_path, environment)
        elif name := name_of(block):
            (tmp_path / name).write_text(block.body)
            if name not in told:
                check(f"squall run {name}", "", tmp_path, environment)


def examples() -> list[tuple[str, str]]:
    """The reference's examples, each with the name it stands under."""
    parts = re.split(r"^##+ `(.*?)`$", REFERENCE.read_text(), flags=re.MULTILINE)
    sections = list(zip(parts[1::2], parts[2::2], strict=True))
    return [(name, block.body) for name, text in sections for block in blocks(text) if block.kind == "python"]


@pytest.mark.parametrize(("name", "program"), examples(), ids=[name for name, _ in examples()])
def test_example_of_the_reference_runs(name: str, program: str, tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "example.py").write_text(PRELUDE + program)
    runner = "squall run" if "local_entrypoint" in program else "python"
    check(f"{runner} example.py", "", tmp_path, environment)
