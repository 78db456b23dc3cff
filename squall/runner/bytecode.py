"""Compiles an image's installed packages, run by the image's own Python at the end of a step that installs some.

A container's files are its own and gone with it, so what is not compiled in the image would be compiled in every
container. Compiling numpy and pandas takes ten seconds of CPU, so results are kept in a cache that all builds share, by
the source's digest and place. The files depend on no time stamp (PEP 552, unchecked), since layers are copied about.
Run as a plain script; standard library only; must never fail a build: what does not compile is left as it is.
Tested in `tests/unit/test_bytecode.py`.
"""

from __future__ import annotations

import hashlib
import importlib._bootstrap_external as bootstrap
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator

CHUNK = 64


def sources(roots: list[str]) -> Iterator[tuple[str, str]]:
    """Each Python source without bytecode, and where its bytecode belongs."""
    tag = sys.implementation.cache_tag
    for root in roots:
        for directory, names, files in os.walk(root):
            if "__pycache__" in names:
                names.remove("__pycache__")
            found = [name for name in files if name.endswith(".py")]
            if not found:
                continue
            cache = os.path.join(directory, "__pycache__")
            done = set(os.listdir(cache)) if os.path.isdir(cache) else set()
            for name in found:
                compiled = f"{name[:-3]}.{tag}.pyc"
                if compiled not in done:
                    yield os.path.join(directory, name), os.path.join(cache, compiled)


def compile_one(source: str, target: str, cache: str) -> None:
    with open(source, "rb") as file:
        text = file.read()
    name = hashlib.blake2b(text + b"\0" + os.fsencode(source) + sys.version.encode(), digest_size=20).hexdigest()
    kept = os.path.join(cache, name[:2], name)
    try:
        with open(kept, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        data = _compile(text, source)
        _keep(kept, data)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(target, "wb") as file:
        file.write(data)


def _compile(text: bytes, source: str) -> bytes:
    code = compile(text, source, "exec", dont_inherit=True, optimize=0)
    return bytes(bootstrap._code_to_hash_pyc(code, importlib.util.source_hash(text), False))  # type: ignore[attr-defined]


def _keep(path: str, data: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(data)
    os.replace(temporary, path)


def compile_all(pairs: list[tuple[str, str]], cache: str) -> None:
    for source, target in pairs:
        try:
            compile_one(source, target, cache)
        except (SyntaxError, ValueError, RecursionError, OSError, UnicodeError, MemoryError):
            continue


def main(cache: str) -> None:
    roots = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}
    wanted = [path for path in roots if path.endswith(("site-packages", "dist-packages")) and os.path.isdir(path)]
    pairs = list(sources(sorted(wanted)))
    sys.setrecursionlimit(10_000)
    workers = min(8, os.cpu_count() or 1, len(pairs) // CHUNK + 1)
    children = []
    for number in range(1, workers):
        pid = os.fork()
        if pid == 0:
            try:
                compile_all(pairs[number::workers], cache)
            finally:
                os._exit(0)
        children.append(pid)
    compile_all(pairs[::workers], cache)
    for pid in children:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(sys.argv[1])
