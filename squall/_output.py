"""What a person sees while an app runs: the output of its containers, notices, and on a terminal a live view.

`Output` writes plainly: the bytes of containers go to this process's stdout and stderr as they are, whole lines at a
time once several containers write, so that their lines never tear. `LiveOutput` is for a terminal: logs above, one
line per function below, and a container's unfinished line (a progress bar drawn with carriage returns) in between.
For programs there is `_output_json`.
Called by the client's reader thread and by the main thread, so all state is behind one lock. Must never raise into
the reader: when the terminal or pipe is gone, output is dropped. rich is imported when the live view first shows,
which a short run never reaches. Tested in `tests/unit/test_output.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from squall.exception import InvalidError
from squall.protocol.messages import LogChunk, Notice

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live
    from rich.text import Text

HELD_LIMIT_BYTES = 64 << 10
"""Longer unfinished lines are written in pieces."""
LIVE_AFTER_S = 0.5
"""A run that is over sooner shows no live view."""
REFRESH_PER_SECOND = 8
BARS_LIMIT = 8
"""Most unfinished lines shown at a time."""

_LINE_END = re.compile(rb"[\r\n]")


def is_terminal(stream: IO[Any]) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM", "") != "dumb"
    except ValueError:  # closed
        return False


def make_output(*, quiet: bool = False, timestamps: bool = False, live: bool = True) -> Output:
    """The output that fits where this process writes; without a live view unless `live`."""
    if live and not quiet and is_terminal(sys.stderr) and has_rich():
        return LiveOutput(timestamps=timestamps)
    return Output(quiet=quiet, timestamps=timestamps)


def has_rich() -> bool:
    """Whether what draws the live view is installed; it is not loaded to find out."""
    import importlib.util

    return importlib.util.find_spec("rich") is not None


_enabled: list[Output] = []
"""What `enable_output` has made, the innermost last."""


def enabled_output() -> Output | None:
    """Where the output of apps goes inside `enable_output`, else None."""
    return _enabled[-1] if _enabled else None


@contextlib.contextmanager
def enable_output(*, show_progress: bool = True, timestamps: bool = False) -> Iterator[None]:
    """Show what apps do, as `squall run` does: for scripts and notebooks, around `app.run()`.

    On a terminal there is a live view: steps of image builds, output of containers above, a line for each function
    below. Elsewhere it is plain lines, whole ones where several containers write. Without it `app.run()` passes
    containers' bytes on as they come. Like `print`, it is for the whole program, not for one thread.

    - `show_progress`: False leaves out the live view and what Squall itself has to say; only containers' output.
    - `timestamps`: True puts the time before each line of a container.

    Raises InvalidError for an argument that is not a bool. Apps that were running before it keep their output.

    Example:

        @app.function()
        def square(x):
            print("squaring", x)
            return x * x

        if __name__ == "__main__":
            with squall.enable_output():
                with app.run():
                    print(list(square.map(range(3))))
    """
    for name, value in (("show_progress", show_progress), ("timestamps", timestamps)):
        if not isinstance(value, bool):
            raise InvalidError(f"`squall.enable_output({name}={value!r})` takes True or False")
    output = make_output(quiet=not show_progress, timestamps=timestamps)
    _enabled.append(output)
    try:
        yield
    finally:
        _enabled.remove(output)
        output.close()


@dataclass
class FunctionStats:
    queued: int = 0
    running: int = 0
    done: int = 0
    failed: int = 0
    containers: int = 0


@dataclass
class _Source:
    """One stream of one container, or of this program when `container_id` is empty."""

    container_id: str
    function: str
    stream: str
    held: bytes = b""
    """Written by it, and not yet by us: its line has not ended."""
    tail: bytes = b""
    """Written by us since its last line end; kept for a terminal only."""


class Output:
    """Plain output. `quiet` leaves out notices; `timestamps` puts the time before each line of a container."""

    def __init__(self, *, quiet: bool = False, timestamps: bool = False) -> None:
        self.quiet = quiet
        self.timestamps = timestamps
        self.leaving = False
        """This program ends the app itself: that it stopped is no news."""
        self._lock = threading.RLock()
        self._sources: dict[tuple[str, str], _Source] = {}
        self._writers: set[str] = set()
        self._open: dict[str, _Source | None] = {}
        """stream -> whose line is unfinished on it."""
        self._said: set[str] = set()

    # -- what the session calls

    def log(self, chunk: LogChunk, data: bytes) -> None:
        """Bytes that a container wrote."""
        with self._lock:
            source = self._source(chunk)
            self._writers.add(chunk.container_id)
            if self.timestamps or len(self._writers) > 1:
                self._by_line(source, data, chunk.at)
            else:
                self._write(source, data)

    def notice(self, notice: Notice) -> None:
        """Something that the server wants known. The same sentence is said once."""
        with self._lock:
            if self.leaving and notice.kind == "stopped":
                return
            text = notice_text(notice)
            if text and not self.quiet and text not in self._said:
                self._said.add(text)
                self.say(text)

    def say(self, text: str) -> None:
        """A line of Squall's own, on stderr."""
        with self._lock:
            self._end_open_line("stderr")
            _write_bytes(self._stream("stderr"), f"{text}\n".encode())

    def yielded(self, value: Any) -> None:
        """A generator that is run by name has given this."""
        print(value, flush=True)

    def returned(self, value: Any) -> None:
        """A function that is run by name has."""
        if value is not None:
            print(value)

    def result(self, value: Any) -> None:
        """What was run, an entrypoint too, has returned this and all is well. People have seen what there is to see."""

    def close(self) -> None:
        """Write what is held. Idempotent."""
        with self._lock:
            for source in self._sources.values():
                if source.held:
                    held, source.held = source.held, b""
                    self._write_line(source, held, 0.0)

    # -- lines

    def _source(self, chunk: LogChunk) -> _Source:
        key = (chunk.container_id, chunk.stream)
        source = self._sources.get(key)
        if source is None:
            stream = "stdout" if chunk.stream == "stdout" else "stderr"
            source = self._sources[key] = _Source(chunk.container_id, chunk.function, stream)
        return source

    def _by_line(self, source: _Source, data: bytes, at: float) -> None:
        """Write up to the last line end; hold the rest until its end comes."""
        data = source.held + data
        cut = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        if not cut and len(data) > HELD_LIMIT_BYTES:
            cut = len(data)
        source.held = data[cut:]
        if cut:
            self._write_line(source, data[:cut], at)

    def _write_line(self, source: _Source, data: bytes, at: float) -> None:
        if self.timestamps:
            stamp = _stamp(at or time.time())
            lines = data.splitlines(keepends=True)
            data = b"".join(stamp + line for line in lines)
        self._write(source, data)

    def _write(self, source: _Source, data: bytes) -> None:
        if not data:
            return
        if self._open.get(source.stream) not in (None, source):
            self._end_open_line(source.stream)
        self._open[source.stream] = None if data.endswith((b"\n", b"\r")) else source
        _write_bytes(self._stream(source.stream), data)

    def _end_open_line(self, stream: str) -> None:
        if self._open.get(stream) is not None:
            self._open[stream] = None
            _write_bytes(self._stream(stream), b"\n")

    def _stream(self, stream: str) -> Any:
        return sys.stdout if stream == "stdout" else sys.stderr


def _stamp(at: float) -> bytes:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))}.{int(at % 1 * 1000):03d} ".encode()


def _write_bytes(stream: Any, data: bytes) -> None:
    """Bytes as they are, after what was printed before them; dropped when nobody can read them any more."""
    try:
        stream.flush()
        raw = getattr(stream, "buffer", None)
        if raw is None:  # replaced by something that takes text only, as in a notebook
            stream.write(data.decode("utf-8", "replace"))
        else:
            raw.write(data)
        stream.flush()
    except (OSError, ValueError):
        pass


def notice_text(notice: Notice) -> str:
    """A notice in a sentence, or empty when it is not worth one."""
    function = notice.data.get("function", "")
    reason = notice.data.get("reason", "")
    said = _NOTICES.get(notice.kind)
    if said is None or not reason:
        return ""
    hint = notice.data.get("hint", "")
    return said.format(function=function, reason=reason) + (f"\nhint: {hint}" if hint else "")


_NOTICES = {
    "stopped": "the app was stopped: {reason}",
    "build": "image step {reason}",
    "waiting": "`{function}` is waiting: {reason}",
    "backoff": "containers of `{function}` keep failing: {reason}",
    "warning": "warning: {reason}",
}


class LiveOutput(Output):
    """For a terminal on stderr. Until the live view shows it writes plainly, as its parent does.

    From the start it stands between this program's own prints and the terminal: a print must go above the live view,
    and a line that the program has begun must not be overwritten when the view comes up.
    """

    def __init__(self, *, timestamps: bool = False) -> None:
        super().__init__(timestamps=timestamps)
        self._live: Live | None = None
        self._timer: threading.Timer | None = None
        self._stats: dict[str, FunctionStats] = {}
        self._began = time.monotonic()
        self._closed = False
        self._last: _Source | None = None
        """Whose text stands where the cursor is."""
        self._streams: dict[str, Any] = {"stdout": sys.stdout, "stderr": sys.stderr}
        self._terminals = {name for name, stream in self._streams.items() if is_terminal(stream)}
        """stdout may be a pipe or a file; it then gets its bytes as they are, live view or not."""
        self._taps = {name: _Tap(self, name, self._streams[name]) for name in self._terminals}
        for name, tap in self._taps.items():
            setattr(sys, name, tap)

    def _stream(self, stream: str) -> Any:
        return self._streams[stream]

    # -- what comes in

    def log(self, chunk: LogChunk, data: bytes) -> None:
        with self._lock:
            source = self._source(chunk)
            if self._is_above(source):
                self._writers.add(chunk.container_id)
                self._feed(source, data, chunk.at)
            else:
                super().log(chunk, data)

    def local(self, stream: str, text: str) -> None:
        """Text that this program itself prints to the terminal."""
        with self._lock:
            source = self._sources.setdefault(("", stream), _Source("", "", stream))
            data = text.encode("utf-8", "replace")
            if self._is_above(source):
                self._feed(source, data, 0.0)
            else:
                self._write(source, data)

    def notice(self, notice: Notice) -> None:
        with self._lock:
            if notice.kind == "stats":
                self._take_stats(notice.data)
            else:
                super().notice(notice)

    def say(self, text: str) -> None:
        with self._lock:
            if self._live is None:
                super().say(text)
            else:
                for line in text.splitlines():
                    self._print(_text(line.encode(), style="dim"))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            live, self._live = self._live, None
            if self._timer is not None:
                self._timer.cancel()
        # Outside the lock: stopping joins the refresh thread, which may be waiting for the lock to draw.
        if live is not None:
            live.stop()
        for name, tap in self._taps.items():
            if getattr(sys, name) is tap:
                setattr(sys, name, self._streams[name])
        super().close()

    # -- numbers

    def _take_stats(self, data: dict[str, Any]) -> None:
        stats = self._stats.setdefault(str(data.get("function", "")), FunctionStats())
        for name in vars(stats):
            if isinstance(data.get(name), int):
                setattr(stats, name, data[name])
        if self._timer is None and not self._closed:
            wait = max(0.0, self._began + LIVE_AFTER_S - time.monotonic())
            self._timer = threading.Timer(wait, self._show)
            self._timer.daemon = True
            self._timer.start()

    # -- the view

    def _show(self) -> None:
        from rich.console import Console
        from rich.live import Live

        with self._lock:
            if self._closed:
                return
            last = self._last
            if last is not None and last.tail:
                # The line under the cursor moves into the view, which would otherwise draw over it.
                _write_bytes(self._streams["stderr"], b"\r\x1b[2K")
                last.held = last.tail
                self._open.clear()
            self._live = Live(
                _View(self),
                console=Console(file=self._streams["stderr"], highlight=False),
                refresh_per_second=REFRESH_PER_SECOND,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()

    def _is_above(self, source: _Source) -> bool:
        """This stream's lines are printed above the live view."""
        return self._live is not None and source.stream in self._terminals

    def _feed(self, source: _Source, data: bytes, at: float) -> None:
        """Print the lines that have ended; the rest is drawn in the view."""
        *lines, held = (source.held + data).split(b"\n")
        source.held = _since_last_return(held)
        if len(source.held) > HELD_LIMIT_BYTES:
            lines.append(source.held)
            source.held = b""
        for line in lines:
            self._print(self._line(source, line, at))

    def _write(self, source: _Source, data: bytes) -> None:
        super()._write(source, data)
        if source.stream in self._terminals:
            self._last = source
            source.tail = _since_last_return((source.tail + data).rpartition(b"\n")[2])[-HELD_LIMIT_BYTES:]

    def _line(self, source: _Source, line: bytes, at: float) -> Text:
        text = _text(_visible(line))
        if not source.container_id:
            return text
        stamp = _stamp(at or time.time()).decode() if self.timestamps else ""
        prefix = stamp + (f"{source.function} {source.container_id[-4:]} | " if len(self._writers) > 1 else "")
        return _text(prefix.encode(), style="dim").append_text(text) if prefix else text

    def _print(self, text: Text) -> None:
        assert self._live is not None
        try:
            self._live.console.print(text, soft_wrap=True)
        except OSError:  # the terminal is gone
            pass

    def render(self) -> list[Text]:
        """The lines of the live view: unfinished lines, then the functions that have had work.

        Takes no lock: rich draws under a lock of its own, which `_print` takes while it holds ours.
        """
        bars = [self._line(source, source.held, 0.0) for source in list(self._sources.values()) if source.held]
        stats = [(name, counts) for name, counts in list(self._stats.items()) if any(vars(counts).values())]
        width = max((len(name) for name, _ in stats), default=0)
        return bars[:BARS_LIMIT] + [_text(_row(name, counts, width).encode()) for name, counts in stats]


class _Tap:
    """Stands in for sys.stdout or sys.stderr while a live output is open; all but writing is the real stream's."""

    def __init__(self, output: LiveOutput, name: str, stream: Any) -> None:
        self._output = output
        self._name = name
        self._real = stream

    def write(self, text: str) -> int:
        self._output.local(self._name, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _View:
    """What rich draws again and again."""

    def __init__(self, output: LiveOutput) -> None:
        self.output = output

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.output.render():
            line.truncate(options.max_width, overflow="ellipsis")
            yield line


def _row(name: str, stats: FunctionStats, width: int) -> str:
    failed = f"  {stats.failed} failed" if stats.failed else ""
    containers = f"{stats.containers} container{'s' if stats.containers != 1 else ''}"
    return f"{name:<{width}}  {stats.queued} queued  {stats.running} running  {stats.done} done{failed}  {containers}"


def _visible(line: bytes) -> bytes:
    """What a terminal shows of a line that was drawn over with carriage returns: its last version."""
    return _LINE_END.split(line.rstrip(b"\r"))[-1]


def _since_last_return(held: bytes) -> bytes:
    """Without the versions that were drawn over, which would pile up under a progress bar; a last `\\r` stays."""
    return held[held.rstrip(b"\r").rfind(b"\r") + 1 :]


def _text(data: bytes, style: str = "") -> Text:
    """Text with its colours, without any other control sequence: a container must not move our cursor."""
    from rich.text import Text

    text = Text.from_ansi(data.decode("utf-8", "replace"), end="\n")
    plain = text.plain
    if not plain.isprintable():
        clean = "".join(c if c.isprintable() or c == "\t" else "" for c in plain)
        text = Text(clean) if clean != plain else text
    if style:
        text.stylize(style)
    return text
