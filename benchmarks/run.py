"""`squall run` of a hello-world: the whole process, with a server running and with none."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import common

HELLO = """
import squall
app = squall.App("hello")

@app.function()
def hello(name):
    return f"hello {name}"

@app.local_entrypoint()
def main():
    print(hello.remote("world"))
"""


def main() -> None:
    script_of_package = Path(sys.executable).with_name("squall")
    squall = [str(script_of_package)] if script_of_package.exists() else [sys.executable, "-m", "squall.cli.main"]
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch, "hello.py")
        script.write_text(HELLO)
        command = [*squall, "run", str(script)]
        without = []
        for _ in range(5):
            with common.own_home():
                without.append(common.timed(lambda: subprocess.run(command, check=True, capture_output=True)))
        common.row("squall run hello.py, no server running", without, "s")
        with common.own_home():
            subprocess.run(command, check=True, capture_output=True)
            running = []
            for _ in range(15):
                running.append(common.timed(lambda: subprocess.run(command, check=True, capture_output=True)))
        common.row("squall run hello.py, server running", running, "s")


if __name__ == "__main__":
    main()
