"""Names the type of a few thousand files of this machine with a real model, over several containers.

The files are read here and sent as bytes. The model (magika: a small neural network that tells what a file is from its
contents) is installed beside Squall and seen in the containers through `Image.host()`. It is loaded once per container.

    pip install magika
    squall run examples/classify.py
    squall run examples/classify.py --files 500 --root ~/Downloads
"""

from __future__ import annotations

import glob
import os
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import squall

if TYPE_CHECKING:
    from magika import Magika

app = squall.App("classify")

ROOTS = ["/usr/share", "/etc", *sorted(glob.glob("/usr/lib/python3*"))]
LIMIT_BYTES = 1 << 20

_model: list[Magika] = []
"""The model of this container, once it is loaded."""


@app.function(cpu=0.5, memory=512, max_containers=4)
def classify(path: str, content: bytes) -> dict[str, object]:
    """What `content` is, and how long it took to tell."""
    began = time.perf_counter()
    loading = 0.0
    if not _model:
        from magika import Magika

        _model.append(Magika())
        loading = time.perf_counter() - began
        print(f"model loaded in {loading:.2f} s")
    found = _model[0].identify_bytes(content)
    return {
        "path": path,
        "label": found.output.label,
        "what": found.output.description,
        "sure": found.score,
        "seconds": time.perf_counter() - began - loading,
        "loading": loading,
        "container": socket.gethostname(),
    }


def find_files(roots: list[str], wanted: int) -> list[str]:
    """`wanted` readable files below `roots`, drawn at random, so that the mix is the machine's own."""
    found = []
    for root in roots:
        for folder, _, names in os.walk(root):
            found += [os.path.join(folder, name) for name in names]
    found = sorted(path for path in found if os.path.isfile(path) and not os.path.islink(path))
    return random.Random(0).sample(found, min(wanted, len(found)))


def read(paths: list[str]) -> Iterator[tuple[str, bytes]]:
    """Each file's name and first MiB, read when a container is about to need it; unreadable and empty ones are left
    out."""
    for path in paths:
        try:
            with open(path, "rb") as file:
                content = file.read(LIMIT_BYTES)
        except OSError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        if content:
            yield path, content


@app.local_entrypoint()
def main(files: int = 3000, root: str = "") -> None:
    began = time.perf_counter()
    paths = find_files([os.path.expanduser(root)] if root else ROOTS, files)
    listed = time.perf_counter()
    print(f"classifying {len(paths)} files of this machine", file=sys.stderr)

    results: list[dict[str, object]] = []
    first = listed
    for result in classify.starmap(read(paths), order_outputs=False):
        if not results:
            first = time.perf_counter()
        results.append(result)
        if len(results) % 500 == 0:
            rate = len(results) / (time.perf_counter() - first)
            print(f"{len(results):6} of {len(paths)} files, {rate:.0f} files/s", file=sys.stderr)
    ended = time.perf_counter()
    if not results:
        raise SystemExit("no readable file was found")
    print_found(results)
    print_phases(results, find=listed - began, first=first - listed, rest=ended - first)


def print_found(results: list[dict[str, object]]) -> None:
    kinds = Counter(str(result["what"]) for result in results)
    print(f"\n{'what':<34}{'files':>7}{'share':>8}   for example")
    for what, count in kinds.most_common(15):
        example = next(str(result["path"]) for result in results if result["what"] == what)
        print(f"{what[:32]:<34}{count:>7}{count / len(results):>8.1%}   {shortened(example)}")
    others = kinds.most_common()[15:]
    if others:
        print(f"{f'{len(others)} more kinds':<34}{sum(count for _, count in others):>7}")


def shortened(path: str, width: int = 36) -> str:
    return path if len(path) <= width else "…" + path[1 - width :]


def print_phases(results: list[dict[str, object]], *, find: float, first: float, rest: float) -> None:
    containers = Counter(str(result["container"]) for result in results)
    loads = [float(str(result["loading"])) for result in results if result["loading"]]
    model = sum(float(str(result["seconds"])) for result in results)
    shares = ", ".join(str(count) for _, count in containers.most_common())
    print(f"\n{'phase':<34}{'seconds':>9}")
    print(f"{'find the files':<34}{find:>9.2f}")
    print(f"{'to the first result':<34}{first:>9.2f}   containers start, the model loads")
    print(f"{'to the last result':<34}{rest:>9.2f}   {len(results) / max(rest, 1e-9):.0f} files/s")
    print(f"{'model at work, all containers':<34}{model:>9.2f}   {1000 * model / len(results):.1f} ms a file")
    print(f"{'loading the model, all containers':<34}{sum(loads):>9.2f}   once in each of {len(loads)}")
    print(f"\n{len(results)} files in {len(containers)} containers ({shares} files each)")
