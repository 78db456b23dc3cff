"""What `squall shell` calls in a container: writes down the function's environment, which only the runner has.

Commands that are started in a container get the container's plain environment; a function's variables and secrets go
to its runner alone. The file is for root of the container and is removed by the shell that reads it.
Tested in `tests/acceptance/test_shell.py`.
"""

from __future__ import annotations

import os
import shlex
import sys

PROFILE = "/tmp/.squall-profile"


def write(names: list[str], extra: dict[str, str]) -> None:
    """A file of `export` lines: this Python and what it can import, the named variables of this process, `extra`."""
    known = {name: os.environ[name] for name in names if name in os.environ}
    values = {**python_variables(), **known, **extra}
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in values.items() if is_name(name)]
    fd = os.open(PROFILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "w") as stream:
        stream.writelines(lines)


def python_variables() -> dict[str, str]:
    """What makes `python` the Python of the image, with the imports that functions have."""
    own = os.path.dirname(sys.executable)
    paths = [path for path in sys.path if path and not path.startswith((sys.prefix + os.sep, sys.base_prefix + os.sep))]
    path = os.environ.get("PATH", os.defpath)
    return {"PATH": f"{own}{os.pathsep}{path}" if own else path, "PYTHONPATH": os.pathsep.join(paths)}


def is_name(name: str) -> bool:
    """Whether a shell can have a variable of that name."""
    return name.isascii() and name.isidentifier()
