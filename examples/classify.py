"""Names the type of a few thousand files of this machine with a real model, over several containers.

The files are read here and sent as bytes. The model (magika: a small neural network that tells what a file is from its
contents) is in an image that is built the first time. It is loaded once per container.

    squall run examples/classify.py --limit 2000
    squall run examples/classify.py --folder ~/Downloads

Where no image can be built, `pip install magika` beside Squall and say so: `CLASSIFY_ON_HOST=1 squall run ...`.
"""

from __future__ import annotations

import functools
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

STARTED = time.perf_counter()

if os.environ.get("CLASSIFY_ON_HOST"):
    image = squall.Image.host()
else:
    image = squall.Image.debian_slim("3.11").uv_pip_install("magika")

app = squall.App("classify", image=image)

FOLDERS = ["/usr/share", "/etc", *sorted(glob.glob("/usr/lib/python3*"))]
LIMIT_BYTES = 1 << 20


@functools.cache
def model() -> Magika:
    """The model of this container, loaded when it is first asked for."""
    import onnxruntime
    from magika import Magika

    # One thread each: the containers keep all cores busy, and a second one would only spin beside the first. Magika has
    # no argument for it.
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    onnxruntime.InferenceSession = functools.partial(onnxruntime.InferenceSession, sess_options=options)
    return Magika()


@app.function(cpu=0.5, memory=512, max_containers=4)
def classify(path: str, content: bytes) -> dict[str, object]:
    """What `content` is, and how long it took to tell."""
    began = time.perf_counter()
    magika = model()
    loaded = time.perf_counter()
    found = magika.identify_bytes(content)
    return {
        "path": path,
        "label": str(found.output.label),  # plain values: magika need not be installed where they arrive
        "what": str(found.output.description),
        "sure": float(found.score),
        "seconds": time.perf_counter() - loaded,
        "loading": loaded - began,
        "container": socket.gethostname(),
    }


def find_files(folders: list[str], wanted: int) -> list[str]:
    """`wanted` files below `folders`, drawn at random, so that the mix is the machine's own."""
    found: list[str] = []
    waiting = [*folders]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        found.append(entry.path)
        except OSError as error:
            print(f"left out: {error}", file=sys.stderr)
    return random.Random(0).sample(sorted(found), min(wanted, len(found)))


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
def main(folder: str = "", limit: int = 1000) -> None:
    began = time.perf_counter()
    paths = find_files([os.path.expanduser(folder)] if folder else FOLDERS, limit)
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
    print_phases(results, image=began - STARTED, find=listed - began, first=first - listed, rest=ended - first)


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


def print_phases(results: list[dict[str, object]], *, image: float, find: float, first: float, rest: float) -> None:
    containers = Counter(str(result["container"]) for result in results)
    loads = [seconds for result in results if (seconds := float(str(result["loading"]))) > 0.01]
    model = sum(float(str(result["seconds"])) for result in results)
    shares = ", ".join(str(count) for _, count in containers.most_common())
    print(f"\n{'phase':<34}{'seconds':>9}")
    print(f"{'build the image, start the app':<34}{image:>9.2f}   the image only the first time")
    print(f"{'find the files':<34}{find:>9.2f}")
    print(f"{'to the first result':<34}{first:>9.2f}   containers start, the model loads")
    print(f"{'to the last result':<34}{rest:>9.2f}   {len(results) / max(rest, 1e-9):.0f} files/s")
    print(f"{'model at work, all containers':<34}{model:>9.2f}   {1000 * model / len(results):.1f} ms a file")
    print(f"{'loading the model, all containers':<34}{sum(loads):>9.2f}   once in each of {len(loads)}")
    print(f"\n{len(results)} files in {len(containers)} containers ({shares} files each)")
