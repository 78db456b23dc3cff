"""Each promise in SPECIFICATION.md has a number, and a proof that exists or the word `pending`."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

from tests.docs.markdown import ROOT

_ROW = re.compile(r"^\| ([A-Z]\d+[^|]*) \|.*\| ([^|]*) \|$", re.MULTILINE)
_PROOF = re.compile(r"`((?:tests|benchmarks)/[\w/]+\.py)(?:::(\w+))?`")
ROWS = _ROW.findall((ROOT / "SPECIFICATION.md").read_text())


@lru_cache
def names_in(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def test_every_promise_has_a_proof_or_is_pending() -> None:
    assert len(ROWS) > 80
    assert [number for number, proof in ROWS if "pending" not in proof and not _PROOF.search(proof)] == []


def test_every_proof_exists() -> None:
    proofs = {found for _, proof in ROWS for found in _PROOF.findall(proof)}
    gone = [path for path, _ in proofs if not (ROOT / path).is_file()]
    assert gone == []
    assert [f"{path}::{name}" for path, name in sorted(proofs) if name and name not in names_in(ROOT / path)] == []


def test_no_number_is_given_twice() -> None:
    numbers = [number for number, _ in ROWS if re.fullmatch(r"[A-Z]\d+", number)]
    assert sorted(numbers) == sorted(set(numbers))
