"""Durable jobs, spawned and completed: Squall beside Celery on Redis, a plain queue in PostgreSQL, and procrastinate.

Every job is on disk before it is acknowledged: Squall and PostgreSQL sync it, Redis once a second (`appendfsync
everysec`). One program submits no-op jobs as fast as it can and waits until all have ended; the time of each is from
the first submit to the last end, workers being up. Squall and its peers take turns. Peers are put in both ways that
they have: job by job, and many at once, as `spawn_map` does. `scripts/bench spawn` installs them; those that are not
there are left out. `--only` names the parts to run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import squall

if squall.is_local():  # a container sees this file alone
    import common

app = squall.App("bench-spawn")
COUNT = 5000
PEER_COUNT = 2000
SEQUENTIAL = 500
IN_FLIGHT = 64
PEERS = Path(__file__).parent / "peers"
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


@app.function(cpu=0.25, memory=64)
def noop(x: int) -> int:
    return x


class Series:
    """Figures by case, in the order in which they came first."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, case: str, *values: float) -> None:
        self.values.setdefault(case, []).extend(values)
        print(f"  {case}: {statistics.median(values):.1f}", file=sys.stderr, flush=True)

    def show(self) -> None:
        for case, values in self.values.items():
            common.row(case, values, "ms" if "one after the other" in case else "jobs/s")

    def show_ratio(self, case: str, to: str) -> None:
        if case in self.values and to in self.values:
            ratio = statistics.median(self.values[case]) / statistics.median(self.values[to])
            print(f"{case} / {to}: {ratio:.1f}", flush=True)


# ---- Squall ---------------------------------------------------------------------------------------------------------


def wait_for_all(call: squall.FunctionCall[int], count: int) -> None:
    """Look at the counts, which is cheap; a result each would be part of the measure."""
    from squall.client import Client
    from squall.protocol.messages import GetCall

    link = Client.current().link
    while True:
        reply, _ = link.request(GetCall(call.object_id)).wait(60)
        if reply.data["counts"].get("ok", 0) == count:
            return
        time.sleep(0.02)


async def spawn_and_get(count: int) -> None:
    """Jobs spawned one by one, with some under way at once, and the result of each had."""
    room = asyncio.Semaphore(IN_FLIGHT)

    async def one(x: int) -> None:
        async with room:
            call = await noop.spawn.aio(x)
            await call.get.aio(timeout=60)

    await asyncio.gather(*(one(x) for x in range(count)))


def squall_turn(name: str, series: Series) -> None:
    with common.own_home(), app.run():
        wait_for_all(noop.spawn_map(range(200)), 200)  # containers and the Store are up
        began = time.perf_counter()
        call = noop.spawn_map(range(COUNT))
        series.add(f"{name}, spawn_map, acknowledged", COUNT / (time.perf_counter() - began))
        wait_for_all(call, COUNT)
        series.add(f"{name}, spawn_map", COUNT / (time.perf_counter() - began))
        began = time.perf_counter()
        asyncio.run(spawn_and_get(PEER_COUNT))
        series.add(f"{name}, spawn and get, {IN_FLIGHT} at a time", PEER_COUNT / (time.perf_counter() - began))
        times = [common.timed(lambda: noop.spawn(1)) * 1000 for _ in range(SEQUENTIAL)]
        series.add(f"{name}, spawn, one after the other (S15)", *times)


def squall_on_postgres(url: str, turn: int, series: Series) -> None:
    with database(url, f"squall{turn}") as name:
        os.environ["SQUALL_DATABASE_URL"] = f"{url}/{name}"
        try:
            squall_turn("Squall on PostgreSQL", series)
        finally:
            del os.environ["SQUALL_DATABASE_URL"]


# ---- peers ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(*command: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, text=True, start_new_session=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def measured(python: str, program: str, how: str, environment: dict[str, str], workers: int) -> float:
    """What a program of `peers/` says of itself, once its workers are up."""
    command = [python, str(PEERS / program)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(running(*command, how, env=environment, **pipes))
        assert client.stdout is not None
        client.stdout.readline()  # its tables are there
        for _ in range(workers):
            stack.enter_context(running(*command, "worker", env=environment, **QUIET))
        time.sleep(2.5 if workers else 0)
        said, _ = client.communicate("go\n", timeout=900)
    return float(said)


def environment_of(url: str, count: int) -> dict[str, str]:
    return {**os.environ, "BENCH_URL": url, "BENCH_COUNT": str(count), "PYTHONPATH": str(PEERS)}


def celery_turn(python: str, series: Series) -> None:
    with tempfile.TemporaryDirectory() as directory:
        port = "16379"
        redis = ["redis-server", "--port", port, "--dir", directory, "--appendonly", "yes", "--save", ""]
        environment = environment_of(f"redis://127.0.0.1:{port}/0", PEER_COUNT)
        lean = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        worker = [python, "-m", "celery", "-A", "on_celery", "worker", "-c", "2", "-l", "error", *lean]
        with running(*redis, "--appendfsync", "everysec", **QUIET):
            time.sleep(1)
            with running(*worker, cwd=directory, env=environment, **QUIET):
                series.add("Celery on Redis", measured(python, "on_celery.py", "client", environment, 0))


def postgres_turn(python: str, url: str, turn: int, series: Series) -> None:
    """Workers: what gave the highest rates here."""
    cases = [
        ("SKIP LOCKED, job by job", "on_postgres.py", "one by one", PEER_COUNT, 2),
        ("SKIP LOCKED, all put in one transaction", "on_postgres.py", "at once", PEER_COUNT, 8),
        ("procrastinate, job by job", "on_procrastinate.py", "one by one", 500, 2),
        ("procrastinate, batch_defer", "on_procrastinate.py", "at once", 1000, 4),
    ]
    for number, (case, program, how, count, workers) in enumerate(cases):
        with database(url, f"peer{turn}x{number}") as name:
            environment = environment_of(f"{url}/{name}", count)
            series.add(case, measured(python, program, how, environment, workers))


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL of its own, as it comes: each commit is synced. The URL is without a database."""
    binaries = Path(os.path.realpath(shutil.which("postgres") or "/nowhere/postgres")).parent
    directory = tempfile.mkdtemp(prefix="squall-bench-pg-")
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    try:
        if as_user:
            shutil.chown(directory, "postgres", "postgres")
        data = f"{directory}/data"
        initdb = [*as_user, str(binaries / "initdb"), "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8"]
        subprocess.run(initdb, check=True, cwd=directory, **QUIET)  # type: ignore[call-overload]
        server = [*as_user, str(binaries / "postgres"), "-D", data, "-p", "15432", "-k", directory, "-h", "127.0.0.1"]
        with running(*server, cwd=directory, **QUIET):
            time.sleep(2)
            yield "postgresql://postgres@127.0.0.1:15432"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def database(url: str, name: str) -> Iterator[str]:
    import psycopg

    with psycopg.connect(f"{url}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield name
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def find_postgres() -> bool:
    """Whether PostgreSQL and its driver are here; Debian keeps its programs out of PATH."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *map(str, places)])
    return shutil.which("postgres") is not None and importlib.util.find_spec("psycopg") is not None


def has(python: str, modules: str) -> bool:
    found = subprocess.run([python, "-c", f"import {modules}"], capture_output=True, check=False).returncode == 0
    if not found:
        print(f"{python} has not all of {modules}: left out", flush=True)
    return found


def take_turns(turns: int, parts: list[str], peers: str, series: Series) -> None:
    with contextlib.ExitStack() as stack:
        with_celery = "celery" in parts and shutil.which("redis-server") and has(peers, "celery, redis")
        url = stack.enter_context(postgres()) if "postgres" in parts and find_postgres() else ""
        with_queues = url and has(peers, "psycopg, procrastinate")
        for turn in range(turns):
            if "sqlite" in parts:
                squall_turn("Squall on SQLite", series)
            if with_celery:
                celery_turn(peers, series)
            if with_queues:
                postgres_turn(peers, url, turn, series)
            if url:
                squall_on_postgres(url, turn, series)


def main() -> None:
    of_bench = Path(__file__).parent.parent / ".venv-peers/bin/python"
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--peers", default=str(of_bench) if of_bench.exists() else sys.executable, metavar="PYTHON")
    parser.add_argument("--only", default="sqlite,celery,postgres")
    options = parser.parse_args()
    series = Series()
    take_turns(options.turns, options.only.split(","), options.peers, series)
    series.show()
    for name in ("Squall on SQLite", "Squall on PostgreSQL"):
        for peer in list(series.values):
            if not peer.startswith("Squall"):
                series.show_ratio(f"{name}, spawn_map", peer)


if __name__ == "__main__":
    main()
