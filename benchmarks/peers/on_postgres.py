"""A plain queue in PostgreSQL: a table, and workers that take the first free row with `SKIP LOCKED`.

A worker takes and ends a job in one statement, which is the least that such a queue can do. Jobs come one by one, each
on disk before the next, or (`at once`) all in one transaction.
"""

from __future__ import annotations

import os
import sys
import time

import psycopg

TABLE = "CREATE TABLE IF NOT EXISTS jobs (id bigserial PRIMARY KEY, args bytea, state text, result bytea)"
INDEX = "CREATE INDEX IF NOT EXISTS jobs_new ON jobs (id) WHERE state = 'new'"
PUT = "INSERT INTO jobs (args, state) VALUES (%s, 'new')"
TAKE = (
    "UPDATE jobs SET state = 'done', result = args WHERE id = (SELECT id FROM jobs WHERE state = 'new' "
    "ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING id"
)


def work(connection: psycopg.Connection) -> None:
    while True:
        if connection.execute(TAKE).fetchone() is None:
            time.sleep(0.002)


def put(connection: psycopg.Connection, count: int, at_once: bool) -> None:
    if at_once:
        with connection.transaction(), connection.cursor() as cursor:
            cursor.executemany(PUT, [(b"x",)] * count)
        return
    for _ in range(count):
        connection.execute(PUT, (b"x",))


def main() -> None:
    connection = psycopg.connect(os.environ["BENCH_URL"], autocommit=True)
    if sys.argv[1] == "worker":
        work(connection)
    connection.execute(TABLE)
    connection.execute(INDEX)
    print("ready", flush=True)
    sys.stdin.readline()
    count = int(os.environ["BENCH_COUNT"])
    began = time.perf_counter()
    put(connection, count, sys.argv[1] == "at once")
    while connection.execute("SELECT 1 FROM jobs WHERE state = 'new' LIMIT 1").fetchone():
        time.sleep(0.02)
    print(count / (time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
