"""A module that breaks while a container imports it, in the way its function's environment says."""

from __future__ import annotations

import os
import time

import squall

app = squall.App("broken")


@app.function(env={"BREAK": "raise"})
def raises() -> int:
    return 1


@app.function(env={"BREAK": "missing"})
def misses() -> int:
    return 1


@app.function(env={"BREAK": "sys.exit"})
def leaves() -> int:
    return 1


@app.function(env={"BREAK": "exit"})
def vanishes() -> int:
    return 1


@app.function(env={"BREAK": "forever"}, startup_timeout=1)
def dawdles() -> int:
    return 1


@app.function(env={"BREAK": "not"})
def works() -> int:
    return 1


@app.function(env={"BREAK": "moved"})
def moved() -> int:
    return 1


def helper() -> None:
    raise ValueError("not today")


def break_down(how: str) -> None:
    if how == "raise":
        helper()
    if how == "missing":
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    if how == "sys.exit":
        raise SystemExit(7)
    if how == "exit":
        print("vanishing", flush=True)
        os._exit(7)
    if how == "moved":
        del globals()["moved"]
    while how == "forever":
        time.sleep(1)


if not squall.is_local():
    break_down(os.environ.get("BREAK", "not"))
