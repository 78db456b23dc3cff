"""Importing scripts, finding their source, bundling it, and the life of `app.run()`."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import squall
from squall import _session
from squall._context import state
from squall._session import import_ref, prepare
from squall.exception import ConflictError, InvalidError, NotFoundError
from squall.protocol import messages as m
from tests.unit.conftest import SCRIPT

if TYPE_CHECKING:
    from tests.unit.conftest import Peer

pytestmark = pytest.mark.usefixtures("keep_imports")


# ---- references


def test_file_is_imported_under_its_own_name_with_its_directory_first(tmp_path: Path) -> None:
    (tmp_path / "hello_ref.py").write_text(SCRIPT)
    module, name = import_ref(f"{tmp_path}/hello_ref.py::square")
    assert (module.__name__, name) == ("hello_ref", "square")
    assert sys.path[0] == str(tmp_path)
    assert sys.modules["hello_ref"] is module


def test_a_script_that_is_written_again_within_a_second_is_not_mistaken_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "script_again.py"
    for name in ("one", "two"):
        path.write_text(f"import squall\napp = squall.App({name!r})\n@app.function()\ndef f(): pass\n")
        os.utime(path, (1_700_000_000, 1_700_000_000))
        sys.modules.pop("script_again", None)
        assert import_ref(f"{path}::f")[0].app.name == name


def test_module_is_imported_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pkg_ref").mkdir()
    (tmp_path / "pkg_ref" / "__init__.py").touch()
    (tmp_path / "pkg_ref" / "mod.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    module, name = import_ref("pkg_ref.mod::app.square", as_module=True)
    assert (module.__name__, name) == ("pkg_ref.mod", "app.square")


@pytest.mark.parametrize(
    ("ref", "as_module", "kind", "said"),
    [
        ("nothing_here.py", False, NotFoundError, "there is no such file"),
        (".", False, NotFoundError, "it is a directory"),
        ("notes.txt", False, InvalidError, "not a Python file"),
        ("queue.py", False, InvalidError, "rename the file"),
        ("a.b.py", False, InvalidError, "rename the file"),
        ("no_such_package.mod", True, NotFoundError, "no module `no_such_package`"),
        ("notes.py", True, InvalidError, "takes the name of a module"),
    ],
)
def test_bad_reference_is_answered_with_what_is_wrong(
    ref: str, as_module: bool, kind: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("notes.txt", "queue.py", "a.b.py"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=said):
        import_ref(ref, as_module)


def test_script_that_raises_shows_its_own_lines_only(tmp_path: Path) -> None:
    (tmp_path / "broken_ref.py").write_text("def f():\n    return 1 / 0\nf()\n")
    with pytest.raises(ZeroDivisionError) as error:
        import_ref(str(tmp_path / "broken_ref.py"))
    shown = traceback.extract_tb(error.value.__traceback__)[-2:]
    assert [(os.path.basename(f.filename), f.lineno) for f in shown] == [("broken_ref.py", 3), ("broken_ref.py", 2)]
    assert "broken_ref" not in sys.modules


def test_script_that_does_not_parse_raises_its_syntax_error(tmp_path: Path) -> None:
    (tmp_path / "typo_ref.py").write_text("def f(:\n")
    with pytest.raises(SyntaxError):
        import_ref(str(tmp_path / "typo_ref.py"))


def test_missing_module_inside_the_script_is_the_scripts_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wants_ref.py").write_text("import not_installed_at_all\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        import_ref("wants_ref", as_module=True)


# ---- specs


def test_specs_of_a_script_share_one_bundle_and_import_by_name(tmp_path: Path) -> None:
    (tmp_path / "two_ref.py").write_text(SCRIPT + "\n@app.function()\ndef cube(x): return x ** 3\n")
    module, _ = import_ref(str(tmp_path / "two_ref.py"))
    prepared = prepare(module.app)
    assert len(prepared.blobs) == 1
    assert {(s.module, s.source, s.serialized_blob) for s in prepared.specs} == {("two_ref", *prepared.blobs, "")}
    assert prepared.source_map == {"/src": str(tmp_path)}


def test_source_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "bare_ref.py").write_text(SCRIPT)
    module, _ = import_ref(str(tmp_path / "bare_ref.py"))
    module.app.function(name="other", include_source=False)(module.square.raw_f)
    sources = {spec.tag: bool(spec.source) for spec in prepare(module.app).specs}
    assert sources == {"square": True, "other": False}


def run_python(*args: str, cwd: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(Path(squall.__file__).parents[1])}
    command = [sys.executable, *args]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd, env=env, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


REPORT = """
from squall import _session
spec = _session.prepare(app).specs[0]
print(spec.module, spec.main_alias, bool(spec.source), bool(spec.serialized_blob))
import sys
print(sys.modules.get(spec.module or "-") is sys.modules["__main__"])
"""


def test_script_run_as_main_is_imported_by_its_name_with_an_alias(tmp_path: Path) -> None:
    (tmp_path / "as_main.py").write_text(SCRIPT + REPORT)
    assert run_python("as_main.py", cwd=tmp_path).split("\n") == ["as_main True True False", "True"]


def test_module_run_with_m_is_imported_by_its_full_name(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").touch()
    (tmp_path / "pkg" / "mod.py").write_text(SCRIPT + REPORT)
    assert run_python("-m", "pkg.mod", cwd=tmp_path).split("\n") == ["pkg.mod True True False", "True"]


def test_program_without_a_file_goes_by_value(tmp_path: Path) -> None:
    assert run_python("-c", SCRIPT + REPORT, cwd=tmp_path).split("\n") == ["False False True", "False"]


# ---- the life of app.run()


def plain(x: int) -> int:
    return x


def start_by(peer: Peer) -> None:
    def created(message: m.CreateApp, payload: bytes) -> None:
        functions = {spec.tag: f"fu-{spec.tag}" for spec in message.functions}
        peer.functions.update({f"fu-{spec.tag}": plain for spec in message.functions})
        peer.send(m.Reply({"app_id": "ap-9", "functions": functions}, re=message.id))

    peer.answers[m.CreateApp] = created


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def log(self, chunk: m.LogChunk, data: bytes) -> None:
        self.seen.append((chunk.stream, data))

    def notice(self, notice: m.Notice) -> None:
        self.seen.append(notice.kind)


@pytest.fixture
def app(peer: Peer) -> squall.App:
    start_by(peer)
    app = squall.App("life")
    app.function()(plain)
    return app


def test_run_makes_the_app_and_stops_it_at_the_end(app: squall.App, peer: Peer) -> None:
    with app.run() as running:
        assert running is app
        assert app.app_id == "ap-9"
        assert app.registered_functions["plain"].remote(4) == 4
    assert not app.app_id
    assert [stop.app for stop in peer.of(m.StopApp)] == ["ap-9"]
    assert peer.of(m.CreateApp)[0].name == "life"


def test_source_is_uploaded_before_the_app_is_made(app: squall.App, peer: Peer) -> None:
    with app.run():
        pass
    kinds = [type(message) for message in peer.received]
    assert kinds.index(m.PutBlob) < kinds.index(m.CreateApp)


def test_app_runs_under_asyncio_too(app: squall.App) -> None:
    async def use() -> int:
        async with app.run():
            result: int = await app.registered_functions["plain"].remote.aio(5)
            return result

    assert asyncio.run(use()) == 5


def test_detached_app_is_left_running(app: squall.App, peer: Peer) -> None:
    with app.run(detach=True, name="stays"):
        pass
    assert peer.of(m.StopApp) == []
    assert (peer.of(m.CreateApp)[0].name, peer.of(m.CreateApp)[0].detach) == ("stays", True)


def test_app_cannot_run_twice_at_once(app: squall.App) -> None:
    with app.run(), pytest.raises(ConflictError, match="running already"), app.run():
        pass


def test_last_logs_arrive_before_the_block_is_left(app: squall.App, peer: Peer) -> None:
    def stopped(message: m.StopApp, payload: bytes) -> None:
        peer.send(m.LogChunk("ap-9", "co-1", "plain", "stdout"), b"last words\n")
        peer.send(m.Reply({}, re=message.id))

    peer.answers[m.StopApp] = stopped
    recorder = Recorder()
    with app.run(output=recorder):
        pass
    assert recorder.seen == [("stdout", b"last words\n")]


def test_plain_output_passes_bytes_through_and_says_what_is_wrong(
    app: squall.App, peer: Peer, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    with app.run():
        peer.send(m.LogChunk("ap-9", "co-1", "plain", "stdout"), b"50%\r\xff100%\n")
        peer.send(m.LogChunk("ap-9", "co-1", "plain", "stderr"), b"oops\n")
        peer.send(m.Notice("ap-9", "waiting", {"function": "plain", "reason": "no GPU"}))
        peer.send(m.Notice("ap-9", "waiting", {"function": "plain", "reason": "no GPU"}))
        peer.client.link.request(m.Ping()).wait(5)
    out, err = capfdbinary.readouterr()
    assert out == b"50%\r\xff100%\n"
    assert err == b"oops\nsquall: `plain` is waiting: no GPU\n"


def test_exception_in_the_block_stops_the_app_and_comes_out(app: squall.App, peer: Peer) -> None:
    with pytest.raises(LookupError), app.run():
        raise LookupError
    assert len(peer.of(m.StopApp)) == 1


def test_interrupt_in_the_block_stops_the_app_with_a_short_deadline(
    app: squall.App, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer.answers[m.StopApp] = lambda message, payload: None
    monkeypatch.setattr(_session, "INTERRUPTED_STOP_TIMEOUT", 0.05)
    with pytest.raises(KeyboardInterrupt), app.run():
        raise KeyboardInterrupt
    assert peer.of(m.StopApp)[0].reason == "interrupted"
    assert app.app_id is None


def test_run_in_a_container_is_refused_with_the_way_out(app: squall.App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "in_container", True)
    with pytest.raises(InvalidError, match="__main__"), app.run():
        pass


def test_blocking_run_in_a_loop_warns(app: squall.App) -> None:
    async def use() -> None:
        with pytest.warns(RuntimeWarning, match="async with app.run"), app.run():
            pass

    asyncio.run(use())


def test_app_without_a_name_gets_that_of_its_module(peer: Peer) -> None:
    start_by(peer)
    app = squall.App()
    app.function()(plain)
    with app.run():
        pass
    assert peer.of(m.CreateApp)[0].name == "test_session"
