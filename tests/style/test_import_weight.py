"""What defining an App costs: the standard library only, without its heavy parts, and nothing that calls a server."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAMS = {
    "a function": """
@app.function(cpu=0.5, memory=256)
def square(x): return x * x

@app.local_entrypoint()
def main(n: int = 3): print(square.remote(n))
""",
    "a class": """
@app.cls(cpu=(0.5, 1), retries=squall.Retries(2))
class Model:
    size: int = squall.parameter(default=1)

    @squall.enter()
    def load(self): self.weights = [self.size]

    @squall.method()
    async def predict(self, x): yield x
""",
    "options": """
secret = squall.Secret.from_dict({"KEY": "value"})

@app.function(secrets=[secret], schedule=squall.Period(hours=1), env={"A": "b"}, gpu="any")
@squall.concurrent(max_inputs=4)
def tick(): return squall.current_input_id()

if squall.is_local():
    busy = tick.with_options(cpu=1)
""",
    "an image": """
image = squall.Image.debian_slim("3.11").uv_pip_install("six").env({"A": "b"}).run_commands("true")

@app.function(image=image)
def square(x): return x * x
""",
}

HEAVY = {
    *("asyncio", "dataclasses", "email", "hashlib", "http", "inspect", "json", "logging", "multiprocessing", "pathlib"),
    *("pickle", "socket", "sqlite3", "ssl", "subprocess", "tempfile", "threading", "unittest", "xml"),
}
CALLS = {"_calling", "_map", "_session", "call", "client", "protocol.frames", "protocol.messages", "protocol.transport"}
"""Modules of Squall that calling needs, and defining does not."""


def loaded(program: str) -> set[str]:
    """Names of the modules that a program loads."""
    program = (
        f"import sys\nbefore = set(sys.modules)\n{program}\n"
        "found = sorted(set(sys.modules) - before)\nimport json\nprint(json.dumps(found))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return set(json.loads(run.stdout))


def foreign(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names) - {"squall"}


@pytest.mark.parametrize("what", sorted(PROGRAMS))
def test_app_and_decorated_function_load_the_standard_library_only(what: str) -> None:
    assert foreign(loaded(f"import squall\napp = squall.App('weight')\n{PROGRAMS[what]}")) == set()


@pytest.mark.parametrize("what", sorted(PROGRAMS))
def test_defining_loads_no_heavy_part_of_the_standard_library_and_nothing_that_calls(what: str) -> None:
    modules = loaded(f"import squall\napp = squall.App('weight')\n{PROGRAMS[what]}")
    assert {name for name in modules if name in HEAVY} == set()
    assert {name for name in modules if name.removeprefix("squall.") in CALLS} == set()


def test_a_function_without_an_image_does_not_load_images() -> None:
    modules = loaded(f"import squall\napp = squall.App('weight')\n{PROGRAMS['a function']}")
    assert "squall.app" in modules and "squall.image" not in modules


def test_runner_loads_the_standard_library_only() -> None:
    assert foreign(loaded("import squall.runner.main")) == set()


def test_a_container_finds_in_its_zygote_all_that_its_calls_need() -> None:
    """What a program loads late would be loaded anew in each fork."""
    from squall.runner.main import WARM_MODULES

    program = f"""
import importlib
for name in {WARM_MODULES!r}:
    importlib.import_module(name)
warm = set(sys.modules)
import squall
import squall._calling, squall._map, squall.app, squall.call, squall.client, squall.cls, squall.image
import squall.runner.execute
assert set(sys.modules) == warm, set(sys.modules) - warm
"""
    loaded(program)
