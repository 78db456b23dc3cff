"""procrastinate: jobs deferred one by one, or (`at once`) as its documentation puts many, with `batch_defer`."""

from __future__ import annotations

import asyncio
import os
import sys
import time

import procrastinate

app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=os.environ["BENCH_URL"]))
LEFT = "SELECT count(*) AS n FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"


@app.task(queue="bench", name="noop")
async def noop(x: int) -> int:
    return x


async def measure(count: int, at_once: bool) -> None:
    try:
        await app.schema_manager.apply_schema_async()
    except procrastinate.exceptions.ConnectorException:  # of an earlier turn
        pass
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    began = time.perf_counter()
    if at_once:
        await noop.batch_defer_async(*({"x": n} for n in range(count)))
    else:
        for n in range(count):
            await noop.defer_async(x=n)
    while (await app.connector.execute_query_one_async(LEFT))["n"]:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    print(count / (time.perf_counter() - began), flush=True)


async def main() -> None:
    async with app.open_async():
        if sys.argv[1] == "worker":
            await app.run_worker_async(concurrency=10, wait=True, install_signal_handlers=False)
        else:
            await measure(int(os.environ["BENCH_COUNT"]), sys.argv[1] == "at once")


if __name__ == "__main__":
    asyncio.run(main())
