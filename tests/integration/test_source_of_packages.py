"""The source of a large package: sent once, then what has changed of it; what its ignore file names never is."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

PROGRAM = """
import os, squall
from wide import word
app = squall.App("wide")

@app.function()
def look():
    return word.WORD, len(os.listdir("/src/wide/data")), os.path.exists("/src/wide/left_out.bin")

@app.local_entrypoint()
def main():
    print(*look.remote())
"""
MIB = 1 << 20


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """20 MiB in files that do not compress into each other, and one that is to stay here."""
    draw = random.Random(7)
    package = tmp_path / "wide"
    (package / "data").mkdir(parents=True)
    for number in range(40):
        (package / "data" / f"{number:02}.bin").write_bytes(draw.randbytes(MIB // 2))
    (package / "left_out.bin").write_bytes(b"x")
    (package / "__init__.py").touch()
    (package / "word.py").write_text("WORD = 'first'\n")
    (package / "main.py").write_text(PROGRAM)
    (tmp_path / ".squallignore").write_text("**/left_out.bin\n")
    return package


def run(package: Path) -> tuple[str, str]:
    command = [sys.executable, "-m", "squall.cli", "run", "-m", "wide.main"]
    done = subprocess.run(
        command, cwd=package.parent, env=dict(os.environ), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def stored(home: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (home / "blobs").rglob("*") if path.is_file()}


def test_only_what_has_changed_of_a_package_is_sent_again(home: Path, package: Path) -> None:
    out, said = run(package)
    assert out == "first 40 False"
    assert "warning: the source in" in said and ".squallignore" in said
    before = stored(home)
    assert sum(before.values()) > 20 * MIB
    (package / "word.py").write_text("WORD = 'and longer, the second'\n")
    assert run(package)[0] == "and longer, the second 40 False"
    fresh = {name: size for name, size in stored(home).items() if name not in before}
    assert 0 < sum(fresh.values()) < 6 * MIB
    assert run(package)[0] == "and longer, the second 40 False"
