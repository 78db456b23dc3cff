"""What `import squall` costs: the standard library only, without its heavy parts, and not much time."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, sys
before = set(sys.modules)
import squall
app = squall.App("weight")
@app.function(cpu=0.5, memory=256)
def square(x): return x * x
print(json.dumps(sorted(set(sys.modules) - before)))
"""

HEAVY = {"asyncio", "ssl", "http", "email", "logging", "multiprocessing", "unittest", "xml", "sqlite3", "subprocess"}


def loaded(program: str) -> set[str]:
    """Names of the top-level modules that a program prints as a JSON list."""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return {name.split(".")[0] for name in json.loads(run.stdout)}


def test_app_and_decorated_function_load_the_standard_library_only() -> None:
    assert loaded(PROGRAM) - set(sys.stdlib_module_names) - {"squall"} == set()


def test_app_and_decorated_function_load_no_heavy_part_of_the_standard_library() -> None:
    assert loaded(PROGRAM) & HEAVY == set()


def test_runner_loads_the_standard_library_only() -> None:
    program = PROGRAM.replace("import squall\n", "import squall.runner.main\n").split("app =")[0] + (
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    assert loaded(program) - set(sys.stdlib_module_names) - {"squall"} == set()
