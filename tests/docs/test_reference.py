"""The SDK's reference is made from the docstrings, has every public name, and is up to date."""

from __future__ import annotations

import importlib.util
import inspect
import re
from types import ModuleType

import squall
from squall import exception
from squall.client import _STATUSES
from squall.options import _FLAGS, _READERS
from tests.docs.markdown import ROOT, without_blocks


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
    parts = re.split(r"^##+ (.*)$", generator().page(), flags=re.MULTILINE)
    told = {
        name: without_blocks(text).replace("**and `.aio`**", "")
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    assert [name for name, text in told.items() if len(text.split()) < 4] == []


def test_every_option_is_described_where_it_is_given_and_in_the_guide() -> None:
    said = inspect.getdoc(squall.App.function) or ""
    guide = (ROOT / "docs/guide/functions.md").read_text()
    options = sorted({*_READERS, *_FLAGS})
    assert [name for name in options if f"`{name}" not in said] == []
    assert [name for name in options if f"`{name}`" not in guide] == []


def test_every_error_a_call_may_raise_is_in_the_guide() -> None:
    guide = (ROOT / "docs/guide/errors-and-retries.md").read_text()
    raised = {cls for cls, _ in _STATUSES.values()} | {exception.SerializationError, exception.OutputTimeoutError}
    assert [cls.__name__ for cls in raised if f"`{cls.__name__}`" not in guide] == []


def test_every_public_error_is_in_one_reference_or_the_other() -> None:
    page = (ROOT / "docs/reference/errors.md").read_text()
    missing = [name for name, value in vars(exception).items() if inspect.isclass(value) and f"`{name}" not in page]
    assert [name for name in missing if f"`squall.{name}`" not in page] == []
