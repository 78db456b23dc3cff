"""Stand-in for the runner in tests of runtimes: runs the code it is sent and answers with its `result`.

One JSON string per line in, one JSON value per line out: `{"result": ...}` or `{"error": ..., "errno": ...}`.
"""

from __future__ import annotations

import json
import os
import socket
import traceback
from typing import Any


def serve(fd: int, source: str | None, *control: int) -> int:
    with socket.socket(fileno=fd) as server, server.makefile("rwb") as stream:
        for line in stream:
            names: dict[str, Any] = {"os": os, "source": source, "result": None, "code": None}
            try:
                exec(json.loads(line), names)
                answer = {"result": names["result"]}
            except Exception as error:
                answer = {"error": traceback.format_exc(), "errno": getattr(error, "errno", None)}
            if names["code"] is not None:
                return int(names["code"])
            stream.write(json.dumps(answer).encode() + b"\n")
            stream.flush()
    return 0
