"""How the command line tells what went wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from squall.cli import failures, main
from squall.exception import Error, InvalidError, RemoteError


def squall(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command, run in this process."""
    code = main.execute(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def failing(error: BaseException) -> click.Command:
    def fail() -> None:
        raise error

    return click.Command("fail", callback=fail)


@pytest.fixture
def fail_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make `squall status` raise."""

    def put(error: BaseException) -> None:
        monkeypatch.setattr(main.LazyGroup, "get_command", lambda self, ctx, name: failing(error))

    return put


def test_mistyped_command_is_answered_with_the_one_meant(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = squall(capsys, "conteiner")
    assert (code, out) == (2, "")
    assert err.startswith("error: `squall` has no command `conteiner`\nhint: did you mean `container`?")


def test_mistyped_subcommand_is_answered_with_the_one_meant(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = squall(capsys, "app", "lsit")
    assert code == 2
    assert "did you mean `list`? commands: `history`, `info`, `list`," in err


def test_unknown_option_is_a_usage_error_that_points_to_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = squall(capsys, "status", "--jsno")
    assert (code, out) == (2, "")
    assert "--jsno" in err
    assert "`squall status --help`" in err


def test_version_and_help_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = squall(capsys, "--help")
    assert (code, err) == (0, "")
    assert all(name in out for name in main.COMMANDS)


def test_error_of_squall_is_two_lines_without_a_traceback(capsys: pytest.CaptureFixture[str], fail_with: Any) -> None:
    fail_with(InvalidError("cpu of `f` is `-1`", hint="it is at least 0.1"))
    code, out, err = squall(capsys, "status")
    assert (code, out) == (1, "")
    assert err.splitlines()[0] == "error: cpu of `f` is `-1`"
    assert err.splitlines()[-1] == "hint: it is at least 0.1"
    assert "Traceback" not in err


def test_bug_of_squall_says_so_and_how_to_report_it(capsys: pytest.CaptureFixture[str], fail_with: Any) -> None:
    fail_with(KeyError("x"))
    code, _, err = squall(capsys, "status")
    assert code == 1
    assert err.startswith("error: a bug in Squall: KeyError")
    assert "SQUALL_TRACEBACK=1" in err


def test_traceback_setting_shows_all_frames(
    capsys: pytest.CaptureFixture[str], fail_with: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUALL_TRACEBACK", "1")
    fail_with(Error("no"))
    assert "Traceback" in squall(capsys, "status")[2]


def test_interrupt_exits_with_130(capsys: pytest.CaptureFixture[str], fail_with: Any) -> None:
    fail_with(KeyboardInterrupt())
    assert squall(capsys, "status")[0] == 130


def user_error(tmp_path: Path, text: str) -> BaseException:
    """The exception that a script of the user's raises, called from Squall's code and calling the library."""
    path = tmp_path / "script.py"
    path.write_text(text)
    namespace: dict[str, Any] = {"__name__": "script"}
    exec(compile(text, str(path), "exec"), namespace)
    try:
        click.Command("x", callback=namespace["main"]).main(args=[], standalone_mode=False)
    except Exception as error:
        return error
    raise AssertionError("the script did not fail")


def test_user_traceback_has_the_users_frames_and_what_they_called_but_none_of_ours(tmp_path: Path) -> None:
    error = user_error(tmp_path, "import json\ndef main():\n    json.loads('{')\n")
    text = failures.user_traceback(error)
    assert f'File "{tmp_path}/script.py", line 3, in main' in text
    assert "json.loads('{')" in text
    assert "decoder.py" in text
    assert "site-packages/click" not in text
    assert text.rstrip().splitlines()[-1].startswith("json.decoder.JSONDecodeError")


def test_user_traceback_shows_causes(tmp_path: Path) -> None:
    script = "def main():\n    try:\n        1 / 0\n    except Exception as e:\n        raise ValueError('b') from e\n"
    text = failures.user_traceback(user_error(tmp_path, script))
    assert text.index("ZeroDivisionError") < text.index("was the direct cause") < text.index("ValueError: b")


def test_place_of_an_error_is_the_users_innermost_line(tmp_path: Path) -> None:
    script = "from squall.exception import RemoteError\ndef main():\n    raise RemoteError('lost')\n"
    error = user_error(tmp_path, script)
    assert isinstance(error, RemoteError)
    assert failures.where_of(error).endswith("script.py:3, in main")


def test_did_you_mean_lists_what_there_is_and_no_more_than_ten() -> None:
    assert main.did_you_mean("x", []) == ""
    assert main.did_you_mean("sqare", ["square", "main"]) == "did you mean `square`? there are: `main`, `square`"
    assert main.did_you_mean("q", [f"f{n:02}" for n in range(12)]).endswith("and 2 more")


def test_closed_pipe_ends_a_listing_quietly() -> None:
    program = f"{sys.executable} -m squall.cli --help | head -c 1"
    run = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert run.stderr == ""


def test_commands_are_imported_only_when_called() -> None:
    program = (
        "import json, sys; from squall.cli.main import cli; print(json.dumps([m for m in sys.modules if "
        "m.startswith(('squall.cli', 'rich', 'asyncio', 'squall.node', 'squall.server'))]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True, env=dict(os.environ)
    )
    assert set(json.loads(run.stdout)) == {"squall.cli", "squall.cli.main", "squall.cli.failures"}
