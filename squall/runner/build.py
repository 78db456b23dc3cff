"""Runs the function of a `run_function` step, in a build container, by the image's Python.

Started as a plain script with the directory of the step's inputs: `function` is the function by value, `args` its
arguments. What it prints goes to whoever builds; what it raises fails the step with its traceback. Tested in
`tests/integration/test_images.py`.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path


def main(inputs: Path) -> int:
    # By its path, this script's own directory comes first: `squall.runner` must not hide the standard library.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from squall.exception import Error
    from squall.protocol import payload as payloads

    try:
        function = payloads.unpack((inputs / "function").read_bytes(), "the function of this step")
        args, kwargs = payloads.unpack((inputs / "args").read_bytes(), "the function's arguments")
    except Error as error:
        print(error, file=sys.stderr)
        return 1
    try:
        function(*args, **kwargs)
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            return 0
        traceback.print_exc(limit=-20)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
