"""What reaches stdout and stderr of the output of containers."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import squall
from squall import _output as output
from squall._output import LiveOutput, Output
from squall.exception import InvalidError
from squall.protocol.messages import LogChunk, Notice


def chunk(container: str, stream: str = "stdout") -> LogChunk:
    return LogChunk("ap-1", container, "f", stream, at=1_000_000_000.25)


def test_bytes_of_one_container_go_through_unchanged(capfdbinary: Any) -> None:
    out = Output()
    for piece in (b"10%\r", b"100%\r\n", b"\xff\x00half", b" line\n", b"tail"):
        out.log(chunk("co-a"), piece)
    out.close()
    assert capfdbinary.readouterr().out == b"10%\r100%\r\n\xff\x00half line\ntail"


def test_stdout_and_stderr_stay_apart(capfdbinary: Any) -> None:
    out = Output()
    out.log(chunk("co-a"), b"data\n")
    out.log(chunk("co-a", "stderr"), b"complaint\n")
    out.log(chunk("co-a", "system"), b"killed\n")
    assert capfdbinary.readouterr() == (b"data\n", b"complaint\nkilled\n")


def test_what_one_container_writes_appears_at_once(capfdbinary: Any) -> None:
    Output().log(chunk("co-a"), b"name? ")
    assert capfdbinary.readouterr().out == b"name? "


def test_lines_of_several_containers_never_tear(capfdbinary: Any) -> None:
    out = Output()
    out.log(chunk("co-a"), b"a0\n")
    for letter in (b"b", b"a"):
        out.log(chunk(f"co-{letter.decode()}"), letter * 3)
    out.log(chunk("co-b"), b"BBB\nb2")
    out.log(chunk("co-a"), b"AAA\n")
    out.close()
    assert capfdbinary.readouterr().out == b"a0\nbbbBBB\naaaAAA\nb2"


def test_line_that_was_open_when_a_second_container_writes_is_ended(capfdbinary: Any) -> None:
    out = Output()
    out.log(chunk("co-a"), b"working")
    out.log(chunk("co-b"), b"other\n")
    out.log(chunk("co-a"), b"... done\n")
    assert capfdbinary.readouterr().out == b"working\nother\n... done\n"


def test_endless_line_is_written_in_pieces(capfdbinary: Any) -> None:
    out = Output()
    out.log(chunk("co-b"), b"b\n")
    out.log(chunk("co-a"), b"x" * (output.HELD_LIMIT_BYTES + 1))
    assert len(capfdbinary.readouterr().out) == output.HELD_LIMIT_BYTES + 3


def test_timestamps_stand_before_each_line(capfdbinary: Any) -> None:
    out = Output(timestamps=True)
    out.log(chunk("co-a"), b"one\ntwo\n")
    lines = capfdbinary.readouterr().out.splitlines()
    assert [re.sub(rb"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.250 ", b"", line) for line in lines] == [b"one", b"two"]


def test_notice_is_said_once_on_stderr(capfdbinary: Any) -> None:
    out = Output()
    for _ in range(2):
        out.notice(Notice("ap-1", "waiting", {"function": "f", "reason": "no node has 4 GPUs"}))
    assert capfdbinary.readouterr() == (b"", b"`f` is waiting: no node has 4 GPUs\n")


def test_quiet_output_leaves_notices_out(capfdbinary: Any) -> None:
    Output(quiet=True).notice(Notice("ap-1", "backoff", {"function": "f", "reason": "crash"}))
    assert capfdbinary.readouterr().err == b""


def test_output_after_the_reader_has_gone_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.BytesIO):
        def write(self, data: Any) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Broken(), write_through=True))
    Output().log(chunk("co-a"), b"x\n")


class Terminal(io.TextIOWrapper):
    """A terminal's stream whose bytes can be looked at."""

    def __init__(self) -> None:
        self.written = io.BytesIO()
        super().__init__(self.written, encoding="utf-8", write_through=True)

    def isatty(self) -> bool:
        return True

    def shown(self) -> str:
        """What was written, without the sequences that move the cursor and colour."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.written.getvalue().decode())


def a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Put a terminal in the place of both streams; called by the test, since pytest sets its own between fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(output, "LIVE_AFTER_S", 60.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return stream


def stats(**counts: int) -> Notice:
    return Notice("ap-1", "stats", {"function": "square", **counts})


def test_short_run_on_a_terminal_does_not_load_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    out = output.make_output()
    assert isinstance(out, LiveOutput)
    out.notice(stats(done=1))
    out.log(chunk("co-a"), b"10%\rdone\n")
    out.close()
    assert terminal.written.getvalue() == b"10%\rdone\n"


def shown(**counts: int) -> LiveOutput:
    """A live output whose view is up."""
    out = LiveOutput()
    out.notice(stats(**counts))
    out._show()
    return out


def test_live_view_shows_a_line_for_each_function(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    out = shown(queued=5, running=2, done=1, containers=1)
    rows = [text.plain for text in out.render()]
    out.close()
    assert rows == ["square  5 queued  2 running  1 done  1 container"]
    assert "5 queued" in terminal.shown()


def test_lines_go_above_the_live_view_and_say_who_wrote_when_several_do(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    out = shown(running=1)
    out.log(chunk("co-aaaa"), b"alone\n")
    out.log(chunk("co-bbbb"), b"together\n")
    out.close()
    assert "\nalone" in terminal.shown() or "alone\n" in terminal.shown()
    assert "f bbbb | together" in terminal.shown()
    assert "f aaaa | alone" not in terminal.shown()


def test_progress_bar_stays_in_the_live_view_until_its_line_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    out = shown(running=1)
    out.log(chunk("co-a", "stderr"), b"\r 10%")
    out.log(chunk("co-a", "stderr"), b"\r 50%")
    assert out.render()[0].plain == " 50%"
    out.log(chunk("co-a", "stderr"), b"\r100%\n")
    assert len(out.render()) == 1
    out.close()
    assert terminal.shown().count("100%") == 1


def test_container_cannot_move_the_cursor_of_the_live_view(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    out = shown(running=1)
    out.log(chunk("co-a"), b"\x1b[2J\x1b[31mred\x1b[0m\x07\x00 \xff\n")
    out.close()
    assert b"\x1b[2J" not in terminal.written.getvalue()
    assert "red" in terminal.shown()
    assert "\x07" not in terminal.shown()
    assert "\x00" not in terminal.shown()


def test_unfinished_line_is_not_lost_when_the_view_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    out = shown(running=1)
    out.log(chunk("co-a"), b"last words")
    out.close()
    assert terminal.shown().rstrip().endswith("last words")


def test_held_text_does_not_grow_under_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    out = shown(running=1)
    for n in range(2_000):
        out.log(chunk("co-a"), b"\r%5d" % n)
    assert out.render()[0].plain == " 1999"
    out.close()
    assert "    7" not in terminal.shown()


def test_own_prints_go_above_the_live_view_and_are_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    out = shown(running=1)
    print("x" * 300)
    out.close()
    print("after")
    assert "x" * 300 in terminal.shown()
    assert sys.stdout is terminal
    assert terminal.shown().endswith("after\n")


def test_line_that_the_program_has_begun_survives_the_live_view(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    out = LiveOutput()
    print("2 3 5", end=" ")
    out.notice(stats(running=1))
    out._show()
    assert out.render()[0].plain == "2 3 5 "
    print("7")
    out.close()
    assert terminal.shown().count("2 3 5 7") == 1


def test_function_without_any_work_has_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    a_terminal(monkeypatch)
    out = shown(running=1)
    out.notice(Notice("ap-1", "stats", {"function": "idle", "queued": 0, "containers": 0}))
    rows = out.render()
    out.close()
    assert [row.plain.split()[0] for row in rows] == ["square"]


def test_stdout_that_is_no_terminal_gets_its_bytes_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = a_terminal(monkeypatch)
    with (tmp_path / "out").open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        out = shown(running=1)
        out.log(chunk("co-a"), b"\xff\x00\rdata")
        print("mine", file=sys.stdout)
        out.close()
    assert (tmp_path / "out").read_bytes() == b"\xff\x00\rdatamine\n"
    assert "data" not in terminal.shown()


def test_enable_output_is_what_apps_take_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    assert output.enabled_output() is None
    with squall.enable_output():
        outer = output.enabled_output()
        assert isinstance(outer, LiveOutput)
        with squall.enable_output(show_progress=False):
            inner = output.enabled_output()
            assert isinstance(inner, Output) and inner.quiet
        assert output.enabled_output() is outer
    assert output.enabled_output() is None
    assert sys.stdout is terminal


def test_enable_output_ends_with_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    a_terminal(monkeypatch)
    with pytest.raises(KeyError), squall.enable_output():
        raise KeyError
    assert output.enabled_output() is None


def test_enable_output_takes_bools_only() -> None:
    with pytest.raises(InvalidError, match=r"`squall.enable_output\(timestamps='yes'\)` takes True or False"):
        squall.enable_output(timestamps="yes").__enter__()  # type: ignore[arg-type]
