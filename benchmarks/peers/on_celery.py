"""Celery on Redis: each job sent by itself, each result waited for; as its documentation tunes many short tasks."""

from __future__ import annotations

import os
import sys
import time

from celery import Celery

app = Celery("on_celery", broker=os.environ["BENCH_URL"], backend=os.environ["BENCH_URL"])
app.conf.update(task_acks_late=True, worker_prefetch_multiplier=64)


@app.task(name="noop")
def noop(x: int) -> int:
    return x


def main() -> None:
    count = int(os.environ["BENCH_COUNT"])
    for result in [noop.delay(0) for _ in range(50)]:  # the workers are up
        result.get(timeout=60)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    for result in [noop.delay(n) for n in range(count)]:
        result.get(timeout=600)
    print(count / (time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
