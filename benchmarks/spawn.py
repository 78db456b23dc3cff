"""Durable jobs, spawned and completed: Squall beside Celery on Redis, a plain queue in PostgreSQL, and procrastinate.

Every job is on disk before it is acknowledged: Squall and PostgreSQL sync it, Redis once a second (`appendfsync
everysec`). One program submits no-op jobs as fast as it can and waits until all have ended; the time of each is from
the first submit to the last end, workers being up. Peers that are not installed are left out (`pip install celery redis
procrastinate psycopg[binary]`, and the servers of Redis and PostgreSQL). `--only` names the parts to run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
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
SEQUENTIAL = 500
WORKERS = 2


@app.function(cpu=0.25, memory=64)
def noop(x: int) -> int:
    return x


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


def squall_rates(rounds: int, database: str) -> None:
    with common.own_home(), app.run():
        wait_for_all(noop.spawn_map(range(200)), 200)  # containers and the Store are up
        rates, acks = [], []
        for _ in range(rounds):
            began = time.perf_counter()
            call = noop.spawn_map(range(COUNT))
            acks.append(COUNT / (time.perf_counter() - began))
            wait_for_all(call, COUNT)
            rates.append(COUNT / (time.perf_counter() - began))
        common.row(f"Squall on {database}, spawn_map of {COUNT}: completed", rates, "jobs/s")
        common.row(f"Squall on {database}, spawn_map of {COUNT}: acknowledged", acks, "jobs/s")
        times = [common.timed(lambda: noop.spawn(1)) * 1000 for _ in range(SEQUENTIAL)]
        common.row(f"Squall on {database}, one spawn after the other", times, "ms")


# ---- peers ----------------------------------------------------------------------------------------------------------

CELERY = """
import os, time
from celery import Celery
app = Celery("bench", broker=os.environ["BENCH_REDIS"], backend=os.environ["BENCH_REDIS"])
app.conf.update(task_acks_late=True, worker_prefetch_multiplier=16)

@app.task
def noop(x):
    return x

def measure():
    [r.get(timeout=60) for r in [noop.delay(0) for _ in range(50)]]
    for _ in range(int(os.environ["BENCH_ROUNDS"])):
        began = time.perf_counter()
        results = [noop.delay(n) for n in range(int(os.environ["BENCH_COUNT"]))]
        for result in results:
            result.get(timeout=600)
        print(int(os.environ["BENCH_COUNT"]) / (time.perf_counter() - began), flush=True)
"""

SKIP_LOCKED = """
import os, sys, time, psycopg
url = os.environ["BENCH_POSTGRES"]
if sys.argv[1] == "worker":
    connection = psycopg.connect(url, autocommit=True)
    take = ("UPDATE jobs SET state = 'done', result = args WHERE id = (SELECT id FROM jobs WHERE state = 'new' "
            "ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING id")
    while True:
        if connection.execute(take).fetchone() is None:
            time.sleep(0.002)
count = int(os.environ["BENCH_COUNT"])
connection = psycopg.connect(url, autocommit=True)
connection.execute("CREATE TABLE IF NOT EXISTS jobs (id bigserial PRIMARY KEY, args bytea, state text, result bytea)")
connection.execute("CREATE INDEX IF NOT EXISTS jobs_new ON jobs (id) WHERE state = 'new'")
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(os.environ["BENCH_ROUNDS"])):
    began = time.perf_counter()
    for n in range(count):
        connection.execute("INSERT INTO jobs (args, state) VALUES (%s, 'new')", (b"x",))
    while connection.execute("SELECT 1 FROM jobs WHERE state = 'new' LIMIT 1").fetchone():
        time.sleep(0.02)
    print(count / (time.perf_counter() - began), flush=True)
"""

PROCRASTINATE = """
import asyncio, os, sys, time, procrastinate
app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=os.environ["BENCH_POSTGRES"]))

@app.task(queue="bench")
async def noop(x):
    return x

async def main():
    async with app.open_async():
        if sys.argv[1] == "worker":
            await app.run_worker_async(concurrency=10, wait=True, install_signal_handlers=False)
        await app.schema_manager.apply_schema_async()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        count = int(os.environ["BENCH_COUNT"])
        for _ in range(int(os.environ["BENCH_ROUNDS"])):
            began = time.perf_counter()
            for n in range(count):
                await noop.defer_async(x=n)
            query = "SELECT count(*) AS n FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"
            while (await app.connector.execute_query_one_async(query))["n"]:
                await asyncio.sleep(0.05)
            print(count / (time.perf_counter() - began), flush=True)

asyncio.run(main())
"""


@contextlib.contextmanager
def running(*command: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, text=True, start_new_session=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def rates_of(text: str, count: int) -> list[float]:
    rates = [float(line) for line in text.splitlines() if line.replace(".", "").isdigit()]
    if not rates:
        raise RuntimeError(f"no rate of {count} jobs in {text[-500:]!r}")
    return rates


def celery_rates(python: str, rounds: int, count: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "bench_celery.py").write_text(CELERY)
        port = "16379"
        redis = ["redis-server", "--port", port, "--dir", directory, "--appendonly", "yes", "--save", ""]
        url = f"redis://127.0.0.1:{port}/0"
        environment = {**os.environ, "BENCH_REDIS": url, "BENCH_ROUNDS": str(rounds), "BENCH_COUNT": str(count)}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        worker = [python, "-m", "celery", "-A", "bench_celery", "worker", "-c", str(WORKERS), "-l", "error"]
        with running(*redis, "--appendfsync", "everysec", **quiet):
            time.sleep(1)
            with running(*worker, cwd=directory, env=environment, **quiet):
                command = [python, "-c", "import bench_celery; bench_celery.measure()"]
                done = subprocess.run(
                    command, cwd=directory, env=environment, capture_output=True, text=True, timeout=900
                )
        common.row(f"Celery on Redis, {count} jobs", rates_of(done.stdout + done.stderr, count), "jobs/s")


def postgres_rates(name: str, program: str, python: str, rounds: int, count: int, url: str) -> None:
    environment = {**os.environ, "BENCH_POSTGRES": url, "BENCH_ROUNDS": str(rounds), "BENCH_COUNT": str(count)}
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as workers:
        path = Path(directory, "bench.py")
        path.write_text(program)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with running(python, str(path), "client", env=environment, **pipes) as client:
            assert client.stdout is not None
            client.stdout.readline()  # its tables are there
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            for _ in range(WORKERS):
                workers.enter_context(running(python, str(path), "worker", env=environment, **quiet))
            time.sleep(2)
            said, _ = client.communicate("go\n", timeout=900)
        common.row(f"{name}, {count} jobs", rates_of(said, count), "jobs/s")


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL of its own, as it comes: each commit is synced."""
    binaries = Path(os.path.realpath(shutil.which("postgres") or "/nowhere/postgres")).parent
    directory = tempfile.mkdtemp(prefix="squall-bench-pg-")
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    try:
        if as_user:
            shutil.chown(directory, "postgres", "postgres")
        data = f"{directory}/data"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        initdb = [*as_user, str(binaries / "initdb"), "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8"]
        subprocess.run(initdb, check=True, **quiet)  # type: ignore[call-overload]
        server = [*as_user, str(binaries / "postgres"), "-D", data, "-p", "15432", "-k", directory, "-h", "127.0.0.1"]
        with running(*server, **quiet):
            time.sleep(2)
            yield "postgresql://postgres@127.0.0.1:15432/postgres"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=sys.executable, help="a Python that has the peers")
    parser.add_argument("--only", default="sqlite,celery,postgres")
    options = parser.parse_args()
    parts = options.only.split(",")
    if "sqlite" in parts:
        squall_rates(options.rounds, "SQLite")
    found = subprocess.run([options.peers, "-c", "import celery, redis"], capture_output=True, check=False)
    if "celery" in parts and found.returncode == 0 and shutil.which("redis-server"):
        celery_rates(options.peers, options.rounds, 2000)
    if "postgres" in parts and shutil.which("postgres") and importlib.util.find_spec("psycopg"):
        with postgres() as url:
            postgres_rates("PostgreSQL, SKIP LOCKED", SKIP_LOCKED, options.peers, options.rounds, 2000, url)
            postgres_rates("procrastinate", PROCRASTINATE, options.peers, 1, 500, url)
        with postgres() as url:
            os.environ["SQUALL_DATABASE_URL"] = url
            squall_rates(options.rounds, "PostgreSQL")


if __name__ == "__main__":
    main()
