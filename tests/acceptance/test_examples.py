"""The examples that build an image, run as their README says, with small arguments.

The plain ones, which need no image, are run in `test_cli.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Debian, temporary_home

ROOT = Path(__file__).parents[2]

SECONDS = 400.0
"""For one example, its build included."""


@pytest.fixture(scope="module", autouse=True)
def one_home(debian_layers: Debian) -> Iterator[Path]:
    with temporary_home() as path:
        if os.geteuid() == 0:
            debian_layers.lend(path)
        yield path


def run(name: str, *words: object) -> str:
    """What an example prints."""
    command = [sys.executable, "-m", "squall.cli", "run", f"examples/{name}.py", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def share(text: str) -> float:
    """The last percentage of a text."""
    return float(re.findall(r"([\d.]+)%", text)[-1])


@pytest.mark.root
def test_classify_names_real_files_on_an_image_and_tells_its_phases() -> None:
    out = run("classify", "--limit", 30, "--folder", "docs")
    assert "Markdown document" in out
    assert "to the last result" in out


def test_classify_runs_on_the_host_where_no_image_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("magika")
    monkeypatch.setenv("CLASSIFY_ON_HOST", "1")
    assert "Markdown document" in run("classify", "--limit", 30, "--folder", "docs")


@pytest.mark.root
def test_ocr_reads_most_characters_as_they_were_drawn(tmp_path: Path) -> None:
    page = tmp_path / "page.png"
    out = run("ocr", "--pages", 1, "--text", "LICENSE", "--save", page)
    assert page.read_bytes().startswith(b"\x89PNG")
    assert share(out.splitlines()[-1].split(";")[0]) > 90


@pytest.mark.root
def test_embeddings_find_what_is_meant() -> None:
    out = run("embeddings", "--packages", 150, "--ask", "a game", "--top", 3)
    best = [line for line in out.splitlines() if re.match(r"  0\.\d\d  ", line)]
    assert len(best) == 3
    assert all(re.search("game|puzzle|play", line, re.IGNORECASE) for line in best[:1])


@pytest.mark.root
def test_sweep_finds_a_good_model() -> None:
    out = run("sweep", "--folds", 2, "--width", 2)
    assert "accuracy" in out
    assert share(out) > 90


@pytest.mark.root
@pytest.mark.slow
def test_fine_tuning_learns_and_saves_weights_that_another_container_loads(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    out = run("finetune", "--examples", 20, "--epochs", 2, "--layers", 1, "--save", weights)
    before, *_, after = (float(right) for right in re.findall(r"([\d.]+)%", out))
    assert after > before + 10
    assert weights.stat().st_size > 100_000
    assert "games" in run("finetune", "--weights", weights, "--ask", "play chess, a board game")
