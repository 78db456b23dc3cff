"""Structured log, counters and step timers: the one way anything of Squall is logged, counted or timed.

A log line is a sentence plus `key=value` fields, written with one `write` to stderr or to a file opened for
appending, so lines of several processes never mix. Logging never raises and never blocks on more than that write:
a full disk costs the line, and the counter `log_lines_lost` says so. Must never be given a secret or user data.
Does not use `logging`, which costs more to import than all the rest of the client's start.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class _Sink:
    """Where lines go, for the whole process: set once by each `main` through `configure`."""

    def __init__(self) -> None:
        self.threshold = LEVELS["warning"]
        self.as_json = False
        self.fd = -1
        """-1: whatever `sys.stderr` is at that moment."""

    def write(self, line: str) -> None:
        data = line.encode("utf-8", "backslashreplace")
        try:
            os.write(self.fd if self.fd >= 0 else sys.stderr.fileno(), data)
        except (OSError, ValueError, AttributeError):  # closed, full, or a notebook's stderr without a descriptor
            count("log_lines_lost")


_sink = _Sink()


def configure(level: str = "info", *, path: str | os.PathLike[str] | None = None, format: str = "text") -> None:
    """Say what is logged and where: to `path` (made 0600, appended to), or to stderr."""
    _sink.threshold = LEVELS[level]
    _sink.as_json = format == "json"
    fd = -1
    if path is not None:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if _sink.fd >= 0:
        os.close(_sink.fd)
    _sink.fd = fd


class Logger:
    """Writes lines in the name of one part (`server`, `agent`, `zygote`). Fields are keywords: `info("x", pid=3)`."""

    def __init__(self, part: str) -> None:
        self.part = part

    def debug(self, message: str, **fields: object) -> None:
        self._log("debug", message, fields)

    def info(self, message: str, **fields: object) -> None:
        self._log("info", message, fields)

    def warning(self, message: str, **fields: object) -> None:
        self._log("warning", message, fields)

    def error(self, message: str, **fields: object) -> None:
        self._log("error", message, fields)

    def _log(self, level: str, message: str, fields: dict[str, object]) -> None:
        if LEVELS[level] >= _sink.threshold:
            make = _json_line if _sink.as_json else _text_line
            _sink.write(make(time.time(), level, self.part, message, fields))


def _stamp(at: float) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(at))}.{int(at % 1 * 1000):03d}Z"


def _text_line(at: float, level: str, part: str, message: str, fields: dict[str, object]) -> str:
    tail = "".join(f" {key}={_quoted(value)}" for key, value in fields.items())
    return f"{_stamp(at)} {level} {part}: {_one_line(message)}{tail}\n"


def _json_line(at: float, level: str, part: str, message: str, fields: dict[str, object]) -> str:
    line = {"at": _stamp(at), "level": level, "part": part, "message": message, **fields}
    return json.dumps(line, default=str) + "\n"


def _one_line(text: str) -> str:
    """`text` without what would start a second line or move a terminal's cursor: texts of containers end up here."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _quoted(value: object) -> str:
    text = _one_line(f"{value:.6g}" if isinstance(value, float) else str(value))
    return json.dumps(text, ensure_ascii=False) if not text or any(c in ' ="' for c in text) else text


# ---- counters -----------------------------------------------------------------------------------------------------

_counters: dict[str, float] = {}


def count(name: str, n: float = 1) -> None:
    """Add to a counter of this process."""
    _counters[name] = _counters.get(name, 0) + n


def counters() -> dict[str, float]:
    """All counters of this process, as they stand."""
    return dict(_counters)


# ---- steps --------------------------------------------------------------------------------------------------------


class Steps:
    """Names what is being done and times it: `steps.ms` is name -> milliseconds in the order of doing.

    When a step raises, its name stays in `current`, so that the error can name the step that really failed.
    """

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self.current = ""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.current = name
        began = time.perf_counter()
        try:
            yield
        finally:
            self.ms[name] = self.ms.get(name, 0.0) + (time.perf_counter() - began) * 1000
        self.current = ""
