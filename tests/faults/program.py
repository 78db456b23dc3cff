"""A program that makes calls and writes down what it was told, one line of JSON each. It may be killed at any moment
and started again: then it makes those calls again of which it has no line, spawned ones under the id or the key that
they had. `python -m tests.faults.program SEED FIRST LAST LOG EXECUTIONS`
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import squall
from squall.client import Client
from squall.protocol import payload as payloads
from squall.protocol.messages import InputItem, Submit

ANSWER_SECONDS = 120.0
MAP_INPUTS = 8
SPAWN_INPUTS = 4
KINDS = {"by id": 6, "by key": 4, "spawn_map": 2, "remote": 5, "map": 3, "get": 2}
"""What the calls are, with their weights."""

Line = dict[str, Any]


def lines_of(path: Path) -> list[Line]:
    """What a program wrote; not the half of a line at which it was killed."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def call_id_of(seed: str, op: int) -> str:
    """The id of a call that is made under an id chosen by its caller."""
    return f"fc-{hashlib.blake2b(f'{seed} {op}'.encode(), digest_size=8).hexdigest()}"


class Program:
    def __init__(self, seed: str, log: Path, executions: str, work: Any) -> None:
        self.seed = seed
        self.executions = executions
        self.work = work
        self.done = lines_of(log)
        self._log = log.open("a")
        self._log.write("\n")  # ends the half of a line

    def make(self, op: int) -> None:
        """One call, whichever it is by the seed."""
        rng = random.Random(f"{self.seed} {op}")
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        bodies: dict[str, Callable[[int], Line]] = {
            "by id": self._spawn_by_id, "by key": self._spawn_by_key, "spawn_map": self._spawn_map,
            "remote": self._remote, "map": self._map, "get": lambda op: self._get(rng),
        }  # fmt: skip
        line = {"op": op, "kind": kind, **bodies[kind](op)}
        self.done.append(line)
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()

    def _spawn_by_id(self, op: int) -> Line:
        call_id = call_id_of(self.seed, op)
        self._submit(Submit(call_id, self.work.object_id, [], "spawn"), op)
        return {"call_id": call_id, "run": str(op), "inputs": 1}

    def _spawn_by_key(self, op: int) -> Line:
        """Each try has an id of its own, and the key makes them one call."""
        message = Submit(f"fc-beef{os.urandom(6).hex()}", self.work.object_id, [], "spawn", key=f"op {op}")
        answer = self._submit(message, op)
        return {"call_id": answer["call_id"], "run": str(op), "inputs": 1, "key": message.key}

    def _submit(self, message: Submit, op: int) -> dict[str, Any]:
        data = payloads.pack_call((str(op), 0, self.executions), {}, "work")
        message.items = [InputItem(0, len(data))]
        reply, _ = Client.current().link.request(message, data).wait(ANSWER_SECONDS)
        return reply.data

    def _spawn_map(self, op: int) -> Line:
        run = f"{op}.{os.getpid()}"
        call = self.work.spawn_map([run] * SPAWN_INPUTS, range(SPAWN_INPUTS), [self.executions] * SPAWN_INPUTS)
        return {"call_id": call.object_id, "run": run, "inputs": SPAWN_INPUTS}

    def _remote(self, op: int) -> Line:
        run = f"{op}.{os.getpid()}"
        return {"run": run, "results": [self.work.remote(run, 0, self.executions)]}

    def _map(self, op: int) -> Line:
        run = f"{op}.{os.getpid()}"
        results = list(self.work.map([run] * MAP_INPUTS, range(MAP_INPUTS), [self.executions] * MAP_INPUTS))
        return {"run": run, "results": results}

    def _get(self, rng: random.Random) -> Line:
        """The result of a call that was made before."""
        spawned = [line for line in self.done if "call_id" in line]
        if not spawned:
            return {}
        line = rng.choice(spawned)
        result = squall.FunctionCall.from_id(line["call_id"]).get(timeout=ANSWER_SECONDS)
        return {"got": line["call_id"], "result": result}


def main(seed: str, first: str, last: str, log: str, executions: str) -> None:
    """Make the calls numbered `first` to `last` that have not been made."""
    program = Program(seed, Path(log), executions, squall.Function.from_name("chaos", "work"))
    known = {line["op"] for line in program.done}
    program.work.hydrate()
    for op in range(int(first), int(last)):
        if op not in known:
            program.make(op)


if __name__ == "__main__":
    main(*sys.argv[1:])
