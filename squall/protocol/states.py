"""States of what crosses a process border, each defined in a sentence, and the moves allowed between them.

A state is a plain string on the wire and in the Store. The tables here are the only place that says which move
is legal; the brains that make the moves check themselves against them (`tests/unit/test_states.py`).
"""

from __future__ import annotations

from typing import Literal

InputState = Literal["queued", "running", "backoff", "done"]
"""An input's life in the server.

`queued`   waits for a free slot in a container of its function
`running`  was pushed to a container that has not answered yet; the lease is the container's life
`backoff`  failed and waits out the delay of its retry policy
`done`     has its one recorded result
"""

OutputStatus = Literal["ok", "error", "timeout", "cancelled", "lost", "init_error", "rejected"]
"""How an input ended.

`ok`          the function returned, or its generator ended
`error`       the function raised; the payload is the packed exception
`timeout`     one attempt took longer than `timeout`; its container was killed
`cancelled`   the caller, or the end of the app, cancelled it
`lost`        its container died (killed, crashed, out of memory) more often than infrastructure retries allow
`init_error`  no container of the function could start: the import failed, or start-up crashed or took too long
`rejected`    the server refused to queue it (a limit, a stopped app)
"""

ContainerState = Literal["pending", "creating", "starting", "ready", "draining", "exited"]
"""A container's life.

`pending`   decided by the server, not yet asked of a node
`creating`  asked of a node; the node is making it
`starting`  its process tree stands and was checked from the host; user code is being imported
`ready`     takes inputs
`draining`  takes no new input; ends when its running inputs have ended or its grace is over
`exited`    gone, with an exit reason
"""

AppState = Literal["running", "stopping", "stopped"]
"""`running` takes calls; `stopping` is ending its containers; `stopped` takes nothing and is kept for its history."""

CONTAINER_MOVES: dict[str, frozenset[str]] = {
    "pending": frozenset({"creating", "exited"}),
    "creating": frozenset({"starting", "exited"}),
    "starting": frozenset({"ready", "draining", "exited"}),
    "ready": frozenset({"draining", "exited"}),
    "draining": frozenset({"exited"}),
    "exited": frozenset(),
}

INPUT_MOVES: dict[str, frozenset[str]] = {
    "queued": frozenset({"running", "done"}),
    "running": frozenset({"queued", "backoff", "done"}),
    "backoff": frozenset({"queued", "done"}),
    "done": frozenset(),
}
