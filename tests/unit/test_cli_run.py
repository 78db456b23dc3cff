"""Which entrypoint or function a reference means, and what is said when it means none or several."""

from __future__ import annotations

import itertools
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from squall._output import Output
from squall.cli import main, run
from squall.exception import Error, InvalidError, NotFoundError

_names = itertools.count()

ONE_APP = """
import squall
app = squall.App("one")
@app.function()
def square(x: int): return x * x
@app.function()
def count(n: int): yield from range(n)
@app.local_entrypoint()
def main(n: int = 3): return n
"""

TWO_APPS = """
import squall
left = squall.App("left")
right = squall.App("right")
@left.function()
def f(): ...
@right.function(name="f")
def g(): ...
@right.function()
def h(): ...
"""


def script(tmp_path: Path, text: str) -> str:
    """A script of its own name, so that no test meets another's module."""
    path = tmp_path / f"script_{next(_names)}.py"
    path.write_text(text)
    return str(path)


def error_of(ref: str) -> Error:
    with pytest.raises(Error) as caught:
        run.find_target(ref, False)
    return caught.value


def test_only_entrypoint_is_run_when_none_is_named(tmp_path: Path) -> None:
    target = run.find_target(script(tmp_path, ONE_APP), False)
    assert (target.name, target.function, target.app.name) == ("main", None, "one")


def test_function_and_entrypoint_are_found_by_name(tmp_path: Path) -> None:
    path = script(tmp_path, ONE_APP)
    assert run.find_target(f"{path}::square", False).function is not None
    assert run.find_target(f"{path}::app.main", False).entrypoint is not None


def test_name_that_does_not_exist_is_answered_with_those_that_do(tmp_path: Path) -> None:
    error = error_of(script(tmp_path, ONE_APP) + "::sqare")
    assert isinstance(error, NotFoundError)
    assert error.message.endswith("app `one` has no function or entrypoint `sqare`")
    assert error.hint == "did you mean `square`? there are: `count`, `main`, `square`"


def test_name_that_does_not_exist_in_the_app_named_is_answered_with_those_that_do(tmp_path: Path) -> None:
    error = error_of(script(tmp_path, TWO_APPS) + "::right.x")
    assert (error.message.split(": ")[1], error.hint) == (
        "app `right` has no function or entrypoint `x`",
        "there are: `f`, `h`",
    )


def test_function_in_several_apps_is_ambiguous_until_the_app_is_named(tmp_path: Path) -> None:
    path = script(tmp_path, TWO_APPS)
    error = error_of(f"{path}::f")
    assert "several apps have `f`" in error.message
    assert f"`{path}::left.f`, `{path}::right.f`" in error.hint
    assert run.find_target(f"{path}::left.f", False).app.name == "left"


def test_name_that_one_of_several_apps_has_is_found(tmp_path: Path) -> None:
    assert run.find_target(script(tmp_path, TWO_APPS) + "::h", False).app.name == "right"


def test_several_entrypoints_are_ambiguous_and_listed(tmp_path: Path) -> None:
    path = script(tmp_path, ONE_APP + "@app.local_entrypoint()\ndef other(): ...\n")
    error = error_of(path)
    assert isinstance(error, InvalidError)
    assert "it has several entrypoints" in error.message
    assert error.hint == f"name one: `{path}::main`, `{path}::other`"


def test_several_functions_without_an_entrypoint_are_ambiguous_and_listed(tmp_path: Path) -> None:
    error = error_of(script(tmp_path, TWO_APPS))
    assert "several functions and no entrypoint" in error.message
    assert "::left.f`" in error.hint


def test_only_function_is_run_when_there_is_no_entrypoint(tmp_path: Path) -> None:
    text = "import squall\napp = squall.App('a')\n@app.function()\ndef f(): ...\n"
    assert run.find_target(script(tmp_path, text), False).name == "f"


def test_script_without_an_app_or_with_an_empty_one_says_what_to_write(tmp_path: Path) -> None:
    assert "makes no squall.App" in error_of(script(tmp_path, "x = 1")).message
    empty = error_of(script(tmp_path, "import squall\napp = squall.App('a')"))
    assert "has no entrypoint and no function" in empty.message
    assert "@app.function()" in empty.hint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def (:\n", "SyntaxError"),
        ("import nosuchthing\n", "ModuleNotFoundError: No module named 'nosuchthing'"),
        ("def f():\n    1 / 0\nf()\n", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)\n", "it exits while it is imported"),
    ],
)
def test_script_that_does_not_import_is_told_with_its_own_frames(
    tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = script(tmp_path, text)
    code = main.execute(["run", path])
    err = capsys.readouterr().err
    assert code == 1
    assert f"error: cannot import `{path}`: {said}" in err
    assert "squall/cli" not in err
    assert "importlib" not in err


def test_frames_of_a_script_that_does_not_import_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script(tmp_path, "def f():\n    1 / 0\nf()\n")
    main.execute(["run", path])
    assert f'File "{path}", line 2, in f' in capsys.readouterr().err


def test_missing_package_of_a_script_has_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main.execute(["run", script(tmp_path, "import nosuchthing\n")])
    assert f"hint: is `nosuchthing` installed in the Python at {sys.prefix}?" in capsys.readouterr().err


@pytest.mark.parametrize("ref", ["nosuch.py", ".", "nosuch.txt", "nosuch"])
def test_file_that_is_not_there_is_one_clear_error(ref: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.execute(["run", ref]) == 1
    assert capsys.readouterr().err.startswith(f"error: cannot run `{ref}`: ")


def test_module_that_is_not_there_is_one_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.execute(["run", "-m", "no.such"]) == 1
    assert "there is no module `no`" in capsys.readouterr().err


def test_wrong_value_of_an_option_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script(tmp_path, ONE_APP)
    assert main.execute(["run", path, "--n", "many"]) == 2
    err = capsys.readouterr().err
    assert "'many' is not a valid integer" in err
    assert f"hint: `squall run {path} --help` shows what it takes" in err


def test_unknown_and_missing_options_are_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script(tmp_path, ONE_APP)
    assert main.execute(["run", f"{path}::square"]) == 2
    assert "missing option '--x'" in capsys.readouterr().err
    assert main.execute(["run", path, "--m", "3"]) == 2
    assert "--m" in capsys.readouterr().err


def test_option_of_run_after_the_reference_is_answered_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = script(tmp_path, ONE_APP)
    assert main.execute(["run", path, "--quiet"]) == 2
    assert f"hint: `--quiet` is an option of `squall run`: put it before `{path}`" in capsys.readouterr().err


def test_option_without_its_value_points_to_the_help_of_the_function(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = script(tmp_path, ONE_APP)
    assert main.execute(["run", path, "--n"]) == 2
    assert f"hint: `squall run {path} --help`" in capsys.readouterr().err


def test_place_for_the_result_is_checked_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = script(tmp_path, ONE_APP)
    assert main.execute(["run", "-w", str(tmp_path / "none" / "out"), path]) == 1
    assert "there is no such directory" in capsys.readouterr().err


def test_help_after_the_reference_is_that_of_the_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.execute(["run", script(tmp_path, ONE_APP), "--help"]) == 0
    assert "--n INTEGER" in capsys.readouterr().out


def test_result_that_is_no_text_cannot_be_written(tmp_path: Path) -> None:
    target = run.find_target(script(tmp_path, ONE_APP), False)
    with pytest.raises(InvalidError, match=r"cannot write the result of `main` .* it is int"):
        run.finish(target, 3, str(tmp_path / "out"))


@pytest.mark.parametrize(("result", "written"), [("é", "é".encode()), (b"\x00", b"\x00")])
def test_result_is_written_to_its_file(tmp_path: Path, result: Any, written: bytes) -> None:
    target = run.find_target(script(tmp_path, ONE_APP), False)
    assert run.finish(target, result, str(tmp_path / "out")) == 0
    assert (tmp_path / "out").read_bytes() == written


def test_first_interrupt_says_what_happens_and_how_to_leave_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = run.find_target(script(tmp_path, ONE_APP), False).app
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(KeyboardInterrupt), run.interrupts(app.run(), Output()):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == "stopping app `one` (Ctrl-C again: at once)\n"


def test_run_without_an_interrupt_leaves_the_signals_as_they_were(tmp_path: Path) -> None:
    app = run.find_target(script(tmp_path, ONE_APP), False).app
    before = signal.getsignal(signal.SIGINT)
    with run.interrupts(app.run(), Output()):
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
