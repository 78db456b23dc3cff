"""With `--json` every failure is one document on standard output, and the exit code is what it is without."""

from __future__ import annotations

import json
from typing import Any

import click
import pytest

from squall.cli import failures, main
from squall.exception import BuildError, Error, InvalidError, StartupError


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    """Exit code and the one document; nothing is said on stderr."""
    code = main.execute(list(words))
    out, err = capsys.readouterr()
    assert (err.strip(), out.count("\n")) == ("", 1)
    return code, json.loads(out)


@pytest.fixture
def fail_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make every command raise."""

    def put(error: BaseException) -> None:
        def fail() -> None:
            raise error

        option = click.Option(["--json"], is_flag=True, expose_value=False)
        command = click.Command("fail", callback=fail, params=[option])
        monkeypatch.setattr(main.LazyGroup, "get_command", lambda self, ctx, name: command)

    return put


def test_error_of_squall_has_its_class_message_and_hint(capsys: pytest.CaptureFixture[str], fail_with: Any) -> None:
    fail_with(InvalidError("cpu is `-1`", hint="at least 0.1"))
    code, document = told(capsys, "status", "--json")
    assert document["error"].pop("where").endswith("in fail")
    assert (code, document["error"]) == (1, {"type": "InvalidError", "message": "cpu is `-1`", "hint": "at least 0.1"})


@pytest.mark.parametrize(
    "words", [["app", "list", "--json", "--nosuch"], ["app", "lsit", "--json"], ["container", "stop", "--json"]]
)
def test_wrong_usage_is_a_document_too(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    code, document = told(capsys, *words)
    assert (code, document["error"]["type"]) == (2, "UsageError")
    assert document["error"]["hint"]


def test_last_line_of_a_run_has_a_type(capsys: pytest.CaptureFixture[str]) -> None:
    code, document = told(capsys, "run", "--json", "nosuch.py")
    assert (code, document["type"], document["error"]["type"]) == (1, "error", "NotFoundError")


def test_interrupt_is_told_to_programs_only(capsys: pytest.CaptureFixture[str], fail_with: Any) -> None:
    fail_with(KeyboardInterrupt())
    code, document = told(capsys, "status", "--json")
    assert (code, document["error"]["type"]) == (130, "KeyboardInterrupt")
    assert main.execute(["status"]) == 130
    assert capsys.readouterr().out == ""


def test_bug_of_squall_is_a_document_that_says_so(capsys: pytest.CaptureFixture[str], fail_with: Any) -> None:
    fail_with(KeyError("x"))
    code, document = told(capsys, "status", "--json")
    assert (code, document["error"]["type"]) == (1, "KeyError")
    assert "a bug in Squall" in document["error"]["message"]


def users_error() -> BaseException:
    namespace: dict[str, Any] = {}
    exec(compile("def helper():\n    raise ValueError('mine')\n", "/home/user/script.py", "exec"), namespace)
    try:
        namespace["helper"]()
    except ValueError as error:
        return error
    raise AssertionError


def test_exception_of_the_user_has_their_lines(capsys: pytest.CaptureFixture[str], fail_with: Any) -> None:
    fail_with(failures.UserError(users_error()))
    code, document = told(capsys, "status", "--json")
    assert (code, document["error"]["type"], document["error"]["message"]) == (1, "ValueError", "mine")
    assert 'File "/home/user/script.py", line 2, in helper' in document["error"]["traceback"]
    assert "squall/cli" not in document["error"]["traceback"]


@pytest.mark.parametrize(("kind", "name"), [(StartupError, "StartupError"), (failures.ScriptError, "InvalidError")])
def test_error_with_a_cause_in_the_users_code_shows_its_lines(kind: type[Error], name: str) -> None:
    error = kind("no container could start")
    error.__cause__ = users_error()
    found = failures.document(failures.failure_of(error))
    assert (found["type"], "line 2, in helper" in found["traceback"]) == (name, True)


def test_other_causes_are_nobodys_business() -> None:
    error = BuildError("a step failed")
    error.__cause__ = users_error()
    assert failures.failure_of(error).traceback == ""


def test_error_with_an_exit_code_keeps_it() -> None:
    failure = failures.failure_of(failures.Exits(InvalidError("no", hint="yes"), 3))
    assert (failure.code, failure.type, failure.hint) == (3, "InvalidError", "yes")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("app list --json", True),
        ("app list", False),
        ("run --json hello.py", True),
        ("run -q --json hello.py", True),
        ("run -dqn name --json hello.py", True),
        ("run hello.py --json", False),
        ("run -n --json hello.py", False),
        ("run --name --json hello.py", False),
        ("run --name=x --json hello.py", True),
        ("run -nx --json hello.py", True),
        ("run -- --json", False),
        ("container exec co-1 jq --json", False),
        ("container exec --json co-1 jq", True),
        ("container stop co-1 --json", True),
        ("function autoscaler update f --json", True),
        ("nosuch --json", True),
        ("app nosuch x --json", True),
    ],
)
def test_json_is_asked_for_by_an_option_of_squalls_own(words: str, wanted: bool) -> None:
    assert main.wants_json(words.split()) is wanted
