"""What `import squall`, an App and a decorated function add to a Python that does nothing: CPU and wall time."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time

import common

ROUNDS = 60
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
CASES = {
    "python -c pass": "pass",
    "import squall, an App, a decorated function": (
        "import squall\napp = squall.App('a')\n@app.function(cpu=0.5, memory=256)\ndef f(x): return x\n"
        "@app.local_entrypoint()\ndef main(n: int = 3): print(f.remote(n))\n"
    ),
}


def run(program: str) -> tuple[float, float]:
    """Milliseconds of CPU and of wall time of one process."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, env=ENVIRONMENT, cwd="/")
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu * 1000, wall * 1000


def main() -> None:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for program in CASES.values():
        run(program)  # bytecode is written once
    for _ in range(ROUNDS):
        for name, program in CASES.items():
            found[name].append(run(program))
    for name, values in found.items():
        common.row(f"{name}, CPU", [cpu for cpu, _ in values], "ms")
        common.row(f"{name}, wall", [wall for _, wall in values], "ms")
    plain, ours = found.values()
    for kind in (0, 1):
        more = [mine[kind] - bare[kind] for bare, mine in zip(plain, ours, strict=True)]
        common.row(f"more than Python alone, {('CPU', 'wall')[kind]}", more, "ms")


if __name__ == "__main__":
    main()
