"""`--json`: the option, and the one document that a command then writes on standard output.

A document has the keys of the lists: `app_id`, `name`, `container_id`, `state`, `environment`. Must never let anything
else reach standard output: what the user's code prints meanwhile goes to stderr. Failures are told by `failures`.
Tested in `tests/unit/test_cli_documents.py` and `tests/acceptance/test_cli_json.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


def tell(as_json: bool, document: Any, sentence: str) -> None:
    """What a command has done: a document for programs, else a sentence for people, on stderr."""
    if as_json:
        print_json(document)
    else:
        click.echo(sentence, err=True)


@contextlib.contextmanager
def own_stdout(as_json: bool) -> Iterator[None]:
    """While the user's code runs in this process, what it and its children print goes to stderr."""
    if not as_json:
        yield
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
