"""Every line that `squall run --json` writes is one JSON object, whatever is written by whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from squall import _output_json
from squall._output import HELD_LIMIT_BYTES
from squall._output_json import JsonOutput, json_fields
from squall.protocol.messages import LogChunk, Notice

Made = Callable[..., JsonOutput]


def chunk(container: str, stream: str = "stdout") -> LogChunk:
    return LogChunk("ap-1", container, "f", stream, at=1_000_000_000.25)


@pytest.fixture
def make(capfdbinary: Any) -> Iterator[Made]:
    """Makes outputs, and closes them, as they stand between pytest and its standard output."""
    made: list[JsonOutput] = []

    def new(**options: Any) -> JsonOutput:
        made.append(JsonOutput(**options))
        return made[-1]

    yield new
    for output in made:
        output.close()


def lines(capfd: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def texts(capfd: Any) -> list[str]:
    return [line["text"] for line in lines(capfd)]


def test_a_line_of_a_container_says_where_it_comes_from(make: Made, capfdbinary: Any) -> None:
    output = make()
    output.log(chunk("co-a", "stderr"), b"hello\n")
    output.close()
    about = {"type": "log", "time": 1_000_000_000.25, "function": "f", "container_id": "co-a", "stream": "stderr"}
    assert lines(capfdbinary) == [{**about, "text": "hello\n"}]


def test_partial_lines_of_several_containers_become_whole_ones(make: Made, capfdbinary: Any) -> None:
    output = make()
    for container, data in (("co-a", b"one"), ("co-b", b"two\nth"), ("co-a", b" more\n"), ("co-b", b"ree")):
        output.log(chunk(container), data)
    output.close()
    found = [(line["container_id"], line["text"]) for line in lines(capfdbinary)]
    assert found == [("co-b", "two\n"), ("co-a", "one more\n"), ("co-b", "three")]


def test_containers_that_write_at_once_tear_no_line(make: Made, capfdbinary: Any) -> None:
    output = make()

    def write(name: str) -> None:
        for n in range(100):
            output.log(chunk(name), f"{n} ".encode() + b"x" * 10_000)
            output.log(chunk(name), b"\n")

    threads = [threading.Thread(target=write, args=(f"co-{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    output.close()
    found = lines(capfdbinary)
    for i in range(4):
        own = [line["text"] for line in found if line["container_id"] == f"co-{i}"]
        assert own == [f"{n} {'x' * 10_000}\n" for n in range(100)]


def test_bytes_that_are_no_text_are_escaped_and_a_character_is_never_cut(make: Made, capfdbinary: Any) -> None:
    output = make()
    for data in (b"\xff\x00 \xc3", b"\xa9\n", b"\xe2\x82"):
        output.log(chunk("co-a"), data)
    output.close()
    assert texts(capfdbinary) == ["\\xff\x00 é\n", "\\xe2\\x82"]


def test_progress_bar_comes_version_by_version_and_adds_up_to_what_was_written(make: Made, capfdbinary: Any) -> None:
    output = make()
    for data in (b"\r10%", b"\r20%", b"\r100%", b"\n", b"end\r\n"):
        output.log(chunk("co-a"), data)
    output.close()
    found = texts(capfdbinary)
    assert len(found) > 2
    assert "".join(found) == "\r10%\r20%\r100%\nend\r\n"


def test_line_without_an_end_comes_in_pieces(make: Made, capfdbinary: Any) -> None:
    output = make()
    output.log(chunk("co-a"), b"x" * (HELD_LIMIT_BYTES + 1))
    assert texts(capfdbinary) == ["x" * (HELD_LIMIT_BYTES + 1)]


def test_output_of_a_build_names_its_image(make: Made, capfdbinary: Any) -> None:
    output = make()
    output.log(LogChunk("im-1", "im-1", "image", "stderr"), b"step\n")
    (line,) = lines(capfdbinary)
    assert (line["container_id"], line["image_id"], line["function"]) == (None, "im-1", None)


def test_notice_is_said_once_with_its_hint_apart(make: Made, capfdbinary: Any) -> None:
    output = make()
    for _ in range(2):
        output.notice(Notice("ap-1", "waiting", {"function": "f", "reason": "no gpu", "hint": "buy one"}))
    output.notice(Notice("ap-1", "stats", {"function": "f", "queued": 3}))
    (line,) = lines(capfdbinary)
    assert (line["type"], line["kind"], line["function"], line["hint"]) == ("notice", "waiting", "f", "buy one")
    assert line["text"] == "`f` is waiting: no gpu"


def test_quiet_leaves_out_notices_and_keeps_output(make: Made, capfdbinary: Any) -> None:
    output = make(quiet=True)
    output.notice(Notice("ap-1", "warning", {"reason": "old kernel"}))
    output.say("stopping")
    output.log(chunk("co-a"), b"kept\n")
    assert texts(capfdbinary) == ["kept\n"]


def test_result_is_the_last_line_and_nothing_comes_after_it(make: Made, capfdbinary: Any) -> None:
    output = make()
    output.yielded(1)
    output.log(chunk("co-a"), b"held")
    output.returned(2)
    output.result({"n": 2})
    output.close()
    output.log(chunk("co-a"), b"late\n")
    found = lines(capfdbinary)
    assert [line["type"] for line in found] == ["yield", "log", "result"]
    assert found[-1] == {"type": "result", "value": {"n": 2}}


class Bad:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "kind"),
    [({1, 2}, "builtins.set"), (Bad(), f"{Bad.__module__}.Bad"), (float("inf"), "builtins.float")],
)
def test_value_that_is_no_json_has_its_repr_and_type(value: object, kind: str) -> None:
    shown = json_fields(value)
    assert (set(shown), shown["python_type"]) == ({"repr", "python_type"}, kind)


def test_value_that_holds_itself_is_no_json() -> None:
    value: list[Any] = []
    value.append(value)
    assert json_fields(value)["python_type"] == "builtins.list"


def test_repr_is_bounded_and_says_so() -> None:
    shown = json_fields(b"x" * 1_000_000)
    assert (len(shown["repr"]), shown["repr_truncated"]) == (_output_json.REPR_LIMIT, True)


def test_what_is_written_to_the_descriptor_becomes_lines(make: Made, capfdbinary: Any) -> None:
    output = make()
    os.write(1, b"raw \xff\nhalf")
    print("complaint", file=sys.stderr)
    subprocess.run(["echo", " and its end"], check=True)
    output.close()
    found = [(line["container_id"], line["stream"], line["text"]) for line in lines(capfdbinary)]
    assert found == [
        (None, "stdout", "raw \\xff\n"),
        (None, "stderr", "complaint\n"),
        (None, "stdout", "half and its end\n"),
    ]


def test_child_that_holds_the_output_open_does_not_keep_it_from_ending(make: Made, capfdbinary: Any) -> None:
    output = make()
    with subprocess.Popen(["sleep", "60"]) as child:
        output.result(1)
        output.close()
        assert lines(capfdbinary) == [{"type": "result", "value": 1}]
        assert not output._reader.is_alive()
        child.kill()


def test_reader_that_is_gone_ends_nothing() -> None:
    program = (
        "from squall._output_json import JsonOutput; from squall.protocol.messages import LogChunk\n"
        "import sys\n"
        "output = JsonOutput()\n"
        "for n in range(1000): output.log(LogChunk('ap', 'co', 'f', 'stdout'), b'x' * 1000 + b'\\n')\n"
        "print('done', file=output._stderr)\n"
    )
    line = f'{sys.executable} -c "$PROGRAM" | head -c 1'
    env = {**os.environ, "PROGRAM": program}
    run = subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert (run.stdout, run.stderr) == ("{", "done\n")


def test_streams_are_given_back(make: Made, capfdbinary: Any) -> None:
    stdout, stderr = sys.stdout, sys.stderr
    output = make()
    output.close()
    os.write(1, b"plain\n")
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    assert capfdbinary.readouterr().out == b"plain\n"
