"""The source of a program is compiled once for all containers of it, and an edited one is not mistaken for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

PROGRAM = """
import time
import squall
from prog.helper import WORD

app = squall.App("compiled")

@app.function(single_use_containers=True)
def look():
    from squall.runner import compiled
    try:
        raise RuntimeError("to see a line")
    except RuntimeError as error:
        frame = error.__traceback__.tb_frame
    return sorted(compiled.used), frame.f_code.co_filename, WORD

@app.local_entrypoint()
def main():
    deadline = time.monotonic() + 60
    while True:
        used, file, word = look.remote()
        if len(used) == 3 or time.monotonic() > deadline:
            break
    print(",".join(used), file, word)
"""


def run(directory: Path) -> list[str]:
    command = [sys.executable, "-m", "squall.cli", "run", "-m", "prog.main"]
    done = subprocess.run(
        command, cwd=directory, env=dict(os.environ), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_later_containers_find_their_modules_compiled(home: Path, tmp_path: Path) -> None:
    package = tmp_path / "prog"
    package.mkdir()
    (package / "__init__.py").write_text("'A package.'\n")
    (package / "main.py").write_text(PROGRAM)
    for word in ("first", "second"):
        (package / "helper.py").write_text(f"WORD = {word!r}\n")
        used, file, seen = run(tmp_path)
        assert used == ",".join(f"/src/prog/{name}.py" for name in ("__init__", "helper", "main"))
        assert (file, seen) == ("/src/prog/main.py", word)
