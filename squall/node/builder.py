"""HAND: builds images step by step: a container for each step, whose upper directory becomes a layer.

Owns the builds under way. A step whose layer is there costs nothing; the same step wanted twice at once is built once
and both hear of it. A layer appears whole, by one rename, or not at all: a step that fails, is killed or runs into a
limit leaves nothing. Every step has a deadline, and the disk is watched while it writes. A build container has the
walls of any container, less the few capabilities that package managers need within their user namespace; it gets no
runner socket, and of secrets only those its step names, whose values are struck out of what it writes. What the steps
run is said in `recipes.py`. Tested in `tests/unit/test_builder.py` and `tests/integration/test_images.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import os
import re
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from squall._observe import Logger
from squall.exception import BuildError, Error, NotFoundError, ResourceExhaustedError
from squall.node import recipes, rootfs
from squall.node.layers import Layer, Layers, total_size
from squall.node.native import NativeRuntime
from squall.node.runtime import Build, Exit
from squall.node.sources import unpack
from squall.protocol.images import Settings, build_id_of, check_image, check_secrets, layer_keys, title_of
from squall.protocol.messages import BuildOutput, ContainerSpec, ImageSpec, ImageStep, Message, new_id

OUTPUT_CHUNK_BYTES = 1 << 16
TAIL_BYTES = 6000
LOG_LIMIT_BYTES = 8 << 20
FREE_BYTES = 256 << 20
"""Disk that a build leaves free."""
FREE_FILES_SHARE = 0.01
"""Of the files that the disk can hold, where it has such a limit: empty ones fill it without a byte."""
WATCH_INTERVAL = 0.5
SCRUB_INTERVAL = 300.0
"""Between two layers whose every byte is compared while nothing is built."""
PARALLEL_BUILDS = 4
MAIN = "main"
Send = Callable[[Message, bytes], None]
ReadBlob = Callable[[str], Awaitable[bytes]]

_log = Logger("builder")


@dataclass
class _Work:
    """One layer to be made."""

    key: str
    step: ImageStep
    number: int
    """Of the step in its image, from 1."""
    settings: Settings
    parents: tuple[Layer, ...]
    """The topmost first."""
    image: ImageSpec
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Values of the variables that the step asks for."""


@dataclass
class _Running:
    """A layer that is being made, and the images that wait for it."""

    task: asyncio.Task[Layer]
    listeners: set[str] = field(default_factory=set)
    kill: Callable[[str], None] | None = None
    """Ends its container, once there is one."""
    doom: str = ""
    """Why it is to end."""

    def end(self, reason: str) -> None:
        self.doom = self.doom or reason
        if self.kill is not None:
            self.kill(reason)


class Builder:
    def __init__(
        self, runtime: NativeRuntime, send: Send, read_blob: ReadBlob, *, timeout: float, quota_bytes: int
    ) -> None:
        self.runtime = runtime
        self.layers: Layers = runtime.layers
        self._send = send
        self._read_blob = read_blob
        self._timeout = timeout
        self._quota = quota_bytes
        self._running: dict[str, _Running] = {}
        self._slots = asyncio.Semaphore(PARALLEL_BUILDS)
        self._told_sizes: dict[str, int] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- images

    async def ensure(
        self, image: ImageSpec, secrets: Mapping[str, Mapping[str, str]] | None = None
    ) -> list[tuple[Layer, bool]]:
        """Build what is missing of an image. Each layer, lowest first, and whether it was made just now."""
        check_image(image)
        check_secrets(image, secrets or {})
        image_id = build_id_of(image)
        made: list[tuple[Layer, bool]] = []
        settings = Settings()
        keys = list(layer_keys(image))
        forced = False
        held: list[Layer] = []
        try:
            for number, step in enumerate(image.steps, 1):
                settings.take(step)
                forced = forced or step.force
                for key in [key for key, owner in keys if owner is step]:
                    parents = tuple(reversed([layer for layer, _ in made]))
                    values = (secrets or {}).get(str(number), {})
                    work = _Work(key, step, number, _copy_of(settings), parents, image, values)
                    layer, was_made = await self._layer(work, image_id, forced)
                    self.layers.hold([layer])
                    held.append(layer)
                    made.append((layer, was_made))
            if any(was_made for _, was_made in made):
                self._spawn(self._warm(image))
            return made
        finally:
            self.layers.release(held)

    async def _warm(self, image: ImageSpec) -> None:
        try:
            await self.runtime.warm(image, image.workspace or MAIN)
        except Error as error:  # the first container will say the same
            _log.warning("an image could not be warmed", image=build_id_of(image), error=error.message)

    def cancel(self, image_id: str, reason: str) -> None:
        """Nobody waits for this image any more: end what is built for it alone."""
        for running in self._running.values():
            running.listeners.discard(image_id)
            if not running.listeners:
                running.end(reason)

    # -- keeping the store

    async def prune(self, keep: set[str]) -> list[Layer]:
        """Remove layers whose key is not in `keep`, unless something holds them."""
        await self.runtime.retire({layer.key for layer in self.layers.all()} - keep)
        doomed = self.layers.prune(keep)
        await asyncio.get_running_loop().run_in_executor(self.runtime.executor, self.layers.remove_doomed)
        return doomed

    async def verify(self, image: ImageSpec) -> list[Layer]:
        """Compare every byte of an image with what was built; the damaged layers, which are taken out."""
        damaged = []
        for key, _ in layer_keys(image):
            layer = self.layers.find(key)
            if layer is None or not layer.settled:
                continue
            check = functools.partial(self.layers.check, layer, deep=True)
            wrong = await asyncio.get_running_loop().run_in_executor(None, check)
            if wrong:
                self.layers.quarantine(layer, wrong)
                damaged.append(layer)
        return damaged

    async def scrub(self) -> None:
        """For ever, one layer at a time, slowly: look for bytes that have changed on the disk since they were built."""
        while True:
            await asyncio.sleep(SCRUB_INTERVAL)
            layer = self.layers.least_verified()
            if layer is not None and not self._running:
                await self._scrub_one(layer)

    async def _scrub_one(self, layer: Layer) -> None:
        self.layers.hold([layer])
        try:
            wrong = await asyncio.get_running_loop().run_in_executor(None, _check_gently, self.layers, layer)
        except OSError as error:
            wrong = f"it cannot be read: {error}"
        finally:
            self.layers.release([layer])
        self.layers.verified(layer)
        if wrong:
            self.layers.quarantine(layer, wrong)

    def changed_sizes(self) -> dict[str, int]:
        """Bytes of each layer, when they are others than at the last question; else nothing."""
        sizes = {layer.key: layer.size_bytes for layer in self.layers.all()}
        if sizes == self._told_sizes:
            return {}
        self._told_sizes = sizes
        return sizes

    def start(self) -> None:
        self._spawn(self.scrub())

    async def close(self) -> None:
        for running in list(self._running.values()):
            running.end("the node is shutting down")
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, body: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(body)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- layers

    async def _layer(self, work: _Work, image_id: str, force: bool) -> tuple[Layer, bool]:
        """The layer of a step: found, or made by whoever asks first."""
        running = self._running.get(work.key)
        while running is not None and running.doom:  # given up by those who asked for it
            await asyncio.wait([running.task])
            await asyncio.sleep(0)
            running = self._running.get(work.key)
        found = None if force else self.layers.find(work.key)
        if running is None and found is not None:
            return found, False
        if running is None:
            task = self._spawn(self._make(work))
            running = self._running[work.key] = _Running(task)
            task.add_done_callback(lambda _: self._running.pop(work.key, None))
        running.listeners.add(image_id)
        return await asyncio.shield(running.task), True

    async def _make(self, work: _Work) -> Layer:
        began = time.monotonic()
        check_told(work)
        self._check_room()  # before anything is made, and again when its turn has come
        self.layers.hold(work.parents)
        building = self.layers.begin()
        try:
            async with self._slots:
                self._tell(work, "step", f"{work.number}/{len(work.image.steps)} {title_of(work.step)}")
                self._check_room()
                await self._run(work, building)
                layer = Layer(work.key, title_of(work.step), building)
                layer.seconds = time.monotonic() - began
                layer.inputs = {"kind": work.step.kind, "args": work.step.args, "blob": work.step.blob}
                layer.inputs["parent"] = work.parents[0].key if work.parents else ""
                self.layers.publish(building, layer)
            self._spawn(self._settle(layer))
            self._tell(work, "done", f"{layer.seconds:.1f} s")
            return layer
        except BaseException:
            await asyncio.get_running_loop().run_in_executor(self.runtime.executor, self.layers.abandon, building)
            raise
        finally:
            self.layers.release(work.parents)

    async def _settle(self, layer: Layer) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(None, self.layers.settle, layer)
        except OSError as error:
            _log.error("a layer could not be written out", layer=layer.path.name, error=str(error))

    def _check_room(self) -> None:
        status = os.statvfs(self.layers.root)
        free = status.f_bavail * status.f_frsize
        if free < 2 * FREE_BYTES:
            raise ResourceExhaustedError(
                f"build an image: the disk of `{self.layers.root.parent.parent}` has {free >> 20} MiB left",
                hint="`squall image prune` removes images that nothing uses",
            )
        used = total_size(self.layers.all())
        if used > self._quota:
            raise ResourceExhaustedError(
                f"build an image: layers take {used >> 20} MiB of the {self._quota >> 20} MiB they may",
                hint="`squall image prune` removes images that nothing uses; `SQUALL_IMAGES_GIB` sets the limit",
            )

    def _tell(self, work: _Work, kind: str, text: str = "", data: bytes = b"") -> None:
        running = self._running.get(work.key)
        for image_id in running.listeners if running is not None else ():
            self._send(BuildOutput(image_id, kind, text, work.number), data)

    # -- one step

    async def _run(self, work: _Work, building: Path) -> None:
        """Run a step's command; its tree lies in `building` afterwards. Raises BuildError."""
        host = await self.runtime.host_settings()
        is_files = work.step.kind == "debian" and not work.parents
        recipe = recipes.base_files(work.step, host) if is_files else recipes.recipe_of(work.step, work.settings, host)
        inputs = building / "inputs"
        await self._write_inputs(work, recipe, inputs)
        output = _Output(self, work, building / "log")
        try:
            end = await self._run_container(work, recipe, building, inputs, output)
        finally:
            output.close()
        if end.code or end.oom:
            raise failure(work, end, output.tail())
        if not (building / "tree").is_dir():
            raise BuildError(f"{_which(work)} left no files")
        await asyncio.get_running_loop().run_in_executor(self.runtime.executor, _tidy, building)

    async def _write_inputs(self, work: _Work, recipe: recipes.Recipe, inputs: Path) -> None:
        data = await self._read_blob(work.step.blob) if work.step.blob else b""
        executor = self.runtime.executor
        await asyncio.get_running_loop().run_in_executor(executor, write_inputs, work.step, recipe, inputs, data)

    async def _run_container(
        self, work: _Work, recipe: recipes.Recipe, building: Path, inputs: Path, output: _Output
    ) -> Exit:
        spec = ContainerSpec(
            new_id("bd"), work.image.workspace or MAIN, cpu=float(os.cpu_count() or 1), memory_mib=1024
        )
        root, mounts = self._root(work, recipe, inputs, spec.workspace)
        wanted = building / "tree"

        def harvest(scratch: Path) -> None:
            source = scratch / "u" / recipes.OUT[1:] if recipe.on_host else scratch / "u"
            if source.is_dir() and not source.is_symlink():
                source.rename(wanted)

        container = await self.runtime.build(
            Build(
                spec, root, recipe.command, {**recipe.environment, **work.secrets}, work.settings.workdir or "/root",
                mounts, output.write_end, harvest,
            )
        )  # fmt: skip
        output.begin()
        running = self._running.get(work.key)
        if running is not None:
            running.kill = container.kill
            if running.doom:
                container.kill(running.doom)
        watching = asyncio.ensure_future(self._watch_disk(container.kill))
        timer = asyncio.get_running_loop().call_later(
            self._step_timeout(work), container.kill, f"it took longer than {self._step_timeout(work):g} s"
        )
        try:
            end = await container.wait()
            await output.drained()
            return end
        except asyncio.CancelledError:
            container.kill("the build was cancelled")
            await asyncio.shield(container.wait())
            raise
        finally:
            timer.cancel()
            watching.cancel()

    def _step_timeout(self, work: _Work) -> float:
        return min(self._timeout, float(work.step.args.get("timeout") or self._timeout))

    def _root(
        self, work: _Work, recipe: recipes.Recipe, inputs: Path, workspace: str
    ) -> tuple[tuple[Path, ...] | None, list[tuple[Path, str, bool]]]:
        """The trees below a build's root, and what is shown in it beside them."""
        host = self.runtime.host_settings_now()
        cache = self.runtime.node_dir / "cache" / workspace
        _make_cache(cache)
        shown: list[tuple[str, str]] = [(str(inputs), recipes.INPUTS), *host.mounts]
        if recipe.on_host:
            # That root is this machine's: its own files are where they always are.
            own = [pair for pair in shown if pair[1].startswith(rootfs.INSIDE)]
            return None, [(Path(path), target, False) for path, target in own]
        shown += [*rootfs.squall_mounts(), *uv_mount(work.step)]
        places = [*shown, (str(cache), recipes.CACHE)]
        root = rootfs.image_root(self.runtime.node_dir, [layer.tree for layer in work.parents], places, {})
        mounts = [(Path(path), target, False) for path, target in shown]
        return root.layers, [*mounts, (cache, recipes.CACHE, True)]

    async def _watch_disk(self, kill: Callable[[str], None]) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            status = os.statvfs(self.layers.root)
            if status.f_bavail * status.f_frsize < FREE_BYTES:
                kill(f"the disk is full: a build leaves {FREE_BYTES >> 20} MiB of it free")
                return
            if status.f_files and status.f_favail < status.f_files * FREE_FILES_SHARE:
                kill(f"the disk holds no more files: a build leaves {FREE_FILES_SHARE:.0%} of their number free")
                return


MASKED_BYTES = 4
"""Shorter values than this are not struck out: they would be found in everything."""


class Mask:
    """Strikes secrets out of a stream. What may be the beginning of one is held back until more has come."""

    def __init__(self, values: Iterable[str]) -> None:
        lines = [line.strip() for value in values for line in value.splitlines()]
        said = {text.encode() for line in lines for text in (line, *_passwords(line))}
        self._values = sorted((value for value in said if len(value) >= MASKED_BYTES), key=len, reverse=True)
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        data = self._struck(self._held + data)
        longest = len(self._values[0]) - 1 if self._values else 0
        for length in range(min(longest, len(data)), 0, -1):
            if any(value.startswith(data[-length:]) for value in self._values):
                self._held = data[-length:]
                return data[:-length]
        self._held = b""
        return data

    def rest(self) -> bytes:
        data, self._held = self._held, b""
        return data

    def _struck(self, data: bytes) -> bytes:
        for value in self._values:
            data = data.replace(value, b"***")
        return data


def _passwords(text: str) -> list[str]:
    """What is secret in a URL, as it stands there and as it is meant: programs repeat either, and seldom the whole."""
    found = re.search(r"://([^/@\s]*)@", text)
    _, _, password = found[1].partition(":") if found else ("", "", "")
    if found and not password:  # `https://TOKEN@host`
        password = found[1].rstrip(":")
    return [password, unquote(password)] if password else []


class _Output:
    """What a step's command writes: sent on as it comes, kept in the layer's log, its end kept for an error."""

    def __init__(self, builder: Builder, work: _Work, log: Path) -> None:
        self._builder = builder
        self._work = work
        self._log = log.open("wb", buffering=0)
        self._logged = 0
        self._tail = bytearray()
        self._mask = Mask(work.secrets.values())
        self._read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        self._ended = asyncio.Event()
        self._open = True
        os.set_blocking(self._read_end, False)
        asyncio.get_running_loop().add_reader(self._read_end, self._forward)

    def begin(self) -> None:
        """The container has its copy of the write end."""
        os.close(self.write_end)
        self.write_end = -1

    def _forward(self) -> None:
        try:
            data = os.read(self._read_end, OUTPUT_CHUNK_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._ended.set()
            asyncio.get_running_loop().remove_reader(self._read_end)
            self._take(self._mask.rest())
            return
        self._take(self._mask.feed(data))

    def _take(self, data: bytes) -> None:
        if not data:
            return
        if self._logged < LOG_LIMIT_BYTES:
            self._logged += self._log.write(data)
        self._tail += data
        del self._tail[:-TAIL_BYTES]
        self._builder._tell(self._work, "output", data=data)

    async def drained(self) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._ended.wait(), 2.0)

    def tail(self) -> str:
        text = self._tail.decode(errors="replace")
        return "".join(c if c.isprintable() or c == "\n" else " " for c in text).strip()

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        asyncio.get_running_loop().remove_reader(self._read_end)
        os.close(self._read_end)
        if self.write_end >= 0:
            os.close(self.write_end)
        self._log.close()


def _check_gently(layers: Layers, layer: Layer) -> str:
    """In a thread that gives way to everybody."""
    thread = threading.get_native_id()
    before = os.getpriority(os.PRIO_PROCESS, thread)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, 19)
    try:
        return layers.check(layer, deep=True)
    finally:
        with contextlib.suppress(OSError):  # pool threads go on to other work
            os.setpriority(os.PRIO_PROCESS, thread, before)


def _copy_of(settings: Settings) -> Settings:
    return copy.deepcopy(settings)


def uv_mount(step: ImageStep) -> list[tuple[str, str]]:
    """The uv that came with Squall, for the steps that use it."""
    if step.kind not in ("uv", "uv_sync", "poetry"):
        return []
    path = Path(sys.prefix, "bin", "uv")
    if not path.is_file():
        raise NotFoundError(
            f"`{title_of(step)}`: the node has no uv in `{path.parent}`",
            hint="`pip install uv` beside squall on the node, or use `pip_install`",
        )
    return [(str(path.resolve()), recipes.UV)]


def write_inputs(step: ImageStep, recipe: recipes.Recipe, inputs: Path, data: bytes) -> None:
    """What a step's command reads, as files that everybody may read: inside they are nobody's."""
    inputs.mkdir(mode=0o755)
    files = {name: text.encode() for name, text in recipe.inputs.items()}
    if step.kind == "function":
        files |= {"function": data, "args": bytes.fromhex(step.args["args"])}
    for name, content in files.items():
        (inputs / name).write_bytes(content)
        (inputs / name).chmod(0o644)
    if step.kind == "copy":
        (inputs / "files").mkdir(mode=0o755)
        unpack([data], inputs / "files")


def _make_cache(cache: Path) -> None:
    if not cache.is_dir():
        cache.mkdir(parents=True, mode=0o700)
        cache.chmod(0o755)


def _tidy(building: Path) -> None:
    """Drop what is no part of a layer: the step's inputs, and what lies in /tmp."""
    rootfs.remove_tree(building / "inputs")
    for place in ("tmp", "var/tmp"):
        path = building / "tree" / place
        if not os.path.islink(path.parent) and path.is_dir() and not path.is_symlink():
            for entry in os.listdir(path):
                rootfs.remove_tree(path / entry)


# ---- what failed --------------------------------------------------------------------------------------------------

TAIL_LINES = 30
_UNREACHED = ("Temporary failure resolving", "Could not resolve", "dns error", "Failed to fetch", "Connection refused")
_HINTS = (
    (("No space left on device",), "the disk or a limit of the build is full: `squall image prune` frees some"),
    (
        ("gcc' failed", "cc' failed", "g++' failed", "file or directory: 'gcc'", "unable to execute 'gcc'",
         "file or directory: 'cc'", "C compiler", "Failed to build", "failed to build", "Python.h: No such file",
         "linker `cc` not found"),
        'the package is compiled: put `.apt_install("build-essential", "python3-dev")` before this step',
    ),
    (
        ("No solution found", "No matching distribution", "Could not find a version",
         "was not found in the package registry"),
        "check the name and the versions asked for, or name the index it is in: `index_url=`, `extra_index_url=`",
    ),
    (("Unable to locate package", "has no installation candidate"), "check the name at https://packages.debian.org"),
    (
        _UNREACHED,
        "a build reaches the internet and this machine's proxies and indexes, nothing else of its network",
    ),
    (("command not found", ": not found"), "install the command in an earlier step: `.apt_install(...)`"),
)  # fmt: skip


def check_told(work: _Work) -> None:
    """Whether all secrets are there. A layer that is built again for a container comes without: nobody keeps them."""
    missing = [name for name in work.step.args.get("secrets", []) if name not in work.secrets]
    if missing:
        raise BuildError(
            f"{_which(work)} needs the secret `{missing[0]}`, which only the program that defines the image has",
            hint="run or deploy that program again, or call `image.build()` in it",
        )


def _which(work: _Work) -> str:
    return f"image step {work.number} of {len(work.image.steps)}, `{title_of(work.step)}`,"


def failure(work: _Work, end: Exit, tail: str) -> BuildError:
    """The error of a step: which, what it wrote last, and what to do about it."""
    what = "ran out of memory" if end.oom else "failed: " + end.reason
    shown = "\n".join(f"    {line}" for line in tail.splitlines()[-TAIL_LINES:])
    hint = next((hint for marks, hint in _HINTS if any(mark in tail for mark in marks)), "")
    if work.step.kind == "debian" and any(mark in tail for mark in _UNREACHED):
        hint = "the Debian mirror was not reached; `SQUALL_DEBIAN_MIRROR` names another"
    if end.oom:
        hint = "the node's containers together reached the memory they have"
    return BuildError(f"{_which(work)} {what}" + (f"\n{shown}" if shown else ""), hint=hint)
