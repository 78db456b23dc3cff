"""What happened when to each input and each container: the facts behind `squall trace`.

An input's timeline is one tuple, kept in a ring in memory (the newest RING_LIMIT inputs); a container's is kept with
its record. `trace` cuts the time from `.remote()` to the result into spans that touch each other, so that the parts
add up to the whole by construction; a cold start's spans are refined by what the agent and the runner timed.
All times are wall-clock seconds. Tested in `tests/unit/test_timelines.py`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

RING_LIMIT = 100_000
CHILDREN_LIMIT = 10_000


class InputTimeline(NamedTuple):
    call_id: str
    idx: int
    function: str
    kind: str
    status: str
    attempt: int
    sent_at: float
    """When the caller called; 0 when it did not say."""
    queued_at: float
    pushed_at: float
    """When it was sent to its container; 0 when it never was."""
    started_at: float
    finished_at: float
    done_at: float
    container_id: str
    function_id: str = ""
    """As its caller named it."""
    place: tuple[str, str] = ("main", "main")
    """Workspace and environment of its app."""


@dataclass
class ContainerTimeline:
    requested_at: float
    stood_at: float = 0.0
    """The agent reported it made and checked."""
    steps: dict[str, float] = field(default_factory=dict)
    """The agent's own timing of making it, milliseconds."""
    hello_at: float = 0.0
    load_at: float = 0.0
    loaded_at: float = 0.0
    load_steps: dict[str, float] = field(default_factory=dict)
    exited_at: float = 0.0


class Timelines:
    def __init__(self) -> None:
        self.inputs: deque[InputTimeline] = deque(maxlen=RING_LIMIT)
        self.children: dict[str, list[tuple[int, str, str]]] = {}
        """Call id -> what its inputs called: idx, call id and function; the newest CHILDREN_LIMIT calls."""

    def add_child(self, parent: str, call_id: str, function: str) -> None:
        """An input, `in-<call>-<idx>`, has made a call. What is no input's id is ignored."""
        body, _, idx = parent[3:].rpartition("-")
        if not parent.startswith("in-") or not body or not idx.isdigit():
            return
        made = self.children.setdefault(f"fc-{body}", [])
        if len(made) < CHILDREN_LIMIT:
            made.append((int(idx), call_id, function))
        if len(self.children) > CHILDREN_LIMIT:
            del self.children[next(iter(self.children))]

    def of_call(self, call_id: str) -> list[InputTimeline]:
        return sorted((t for t in self.inputs if t.call_id == call_id), key=lambda t: t.idx)

    def latest(self, place: tuple[str, str]) -> str:
        """The call whose input ended last, of those in a workspace and environment."""
        return next((timeline.call_id for timeline in reversed(self.inputs) if timeline.place == place), "")


def parse_call(ref: str) -> tuple[str, int | None]:
    """`fc-…` is a call, `in-…-3` its input 3."""
    if ref.startswith("in-"):
        body, _, idx = ref[3:].rpartition("-")
        if body and idx.isdigit():
            return f"fc-{body}", int(idx)
    return ref, None


Span = dict[str, Any]


def spans(timeline: InputTimeline, container: ContainerTimeline | None) -> list[Span]:
    """Contiguous spans of one input, from the call to its result, each `{name, start, end, note, parts}`."""
    begin = timeline.sent_at or timeline.queued_at
    marks: list[tuple[str, float, str]] = [("submit", timeline.queued_at, "caller to server")]
    if container is not None and timeline.queued_at <= container.loaded_at <= timeline.pushed_at + 0.001:
        marks += _cold_marks(timeline, container)
    if timeline.pushed_at:
        marks.append(("queue", timeline.pushed_at, "waiting for a free slot"))
        if timeline.started_at:
            marks.append(("deliver", timeline.started_at, "server to runner"))
            marks.append(("run", timeline.finished_at, "your function"))
    marks.append(("return", timeline.done_at, "runner to server"))
    out: list[Span] = []
    at = begin
    for name, end, note in marks:
        end = min(max(at, end), timeline.done_at)
        if end > at or name == "run":
            out.append({"name": name, "start": at, "end": end, "note": note, "parts": _parts(name, container)})
        at = end
    return out


def _cold_marks(timeline: InputTimeline, container: ContainerTimeline) -> list[tuple[str, float, str]]:
    marks = []
    if container.requested_at >= timeline.queued_at:
        marks.append(("place", container.requested_at, "choosing a node"))
    marks += [
        ("container", container.stood_at, "fork, namespaces, root, walls, check"),
        ("runner", container.load_at, "runner connects"),
        ("import", container.loaded_at, "importing your code"),
    ]
    return marks


def _parts(name: str, container: ContainerTimeline | None) -> dict[str, float]:
    if container is None:
        return {}
    return {"container": container.steps, "import": container.load_steps}.get(name, {})
