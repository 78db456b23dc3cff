"""The SDK's reference is made from the docstrings, has every public name, and is up to date."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import squall
from squall.exception import Error
from squall.options import _FLAGS, _READERS

ROOT = Path(__file__).parents[2]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generator", ROOT / "scripts/docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_is_what_the_docstrings_make() -> None:
    made = generator()
    assert made.PAGE.read_text() == made.page(), "run `scripts/docs`"


def test_every_public_name_has_a_heading() -> None:
    page = (ROOT / "docs/reference/sdk.md").read_text()
    assert [name for name in squall.__all__ if f"## `squall.{name}`\n" not in page] == []


def test_every_entry_says_something() -> None:
    parts = generator().page().split("\n## ")
    entries = [entry for part in parts for entry in part.split("\n### ")]
    empty = [entry.splitlines()[0] for entry in entries if len(entry.split("```")[-1].split()) < 3 and "```" in entry]
    assert [name for name in empty if "```python" not in name and "Example" in name] == []
    assert [entry for entry in entries if len(entry.split()) < 5] == []


def test_every_option_is_described_where_it_is_given_and_in_the_guide() -> None:
    said = inspect.getdoc(squall.App.function) or ""
    guide = (ROOT / "docs/guide/functions.md").read_text()
    options = sorted({*_READERS, *_FLAGS})
    assert [name for name in options if f"`{name}" not in said] == []
    assert [name for name in options if f"`{name}`" not in guide] == []


def test_exit_codes_and_errors_have_their_pages() -> None:
    assert "130" in (ROOT / "docs/reference/exit-codes.md").read_text()
    guide = (ROOT / "docs/guide/errors-and-retries.md").read_text()
    remote = [cls.__name__ for cls in Error.__subclasses__() if cls.__name__ == "RemoteError"]
    assert remote
    assert "RemoteError" in guide
