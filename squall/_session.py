"""Running an app: import the script, complete its specs, make the app on the server, follow it, end it.

Owns `import_ref` (what `squall run file.py` names), the specs that the server gets and the life of a `RunningApp`. What
a container imports is decided here: a module by name with its source (`_source`) mounted at `/src`, or, where no source
file exists (`python -c`, a notebook), the function by value. Must never print by itself; logs and notices go to an
`Output`. Tested in `tests/unit/test_session.py` and `tests/integration/test_calls.py`.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import threading
from dataclasses import dataclass, field, replace
from types import CodeType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from squall import _blocking
from squall import client as clients
from squall._context import is_local
from squall._output import enabled_output
from squall._source import Bundle, Origin, checked_module_name, make_bundle, origin_of
from squall._terminal import Between, Terminal, check_terminal
from squall.client import Client, Output
from squall.exception import ConflictError, Error, InvalidError, NotFoundError
from squall.options import checked_name
from squall.protocol import payload as payloads
from squall.protocol.messages import (
    BuildImage,
    CreateApp,
    FunctionSpec,
    GetImage,
    ImageSpec,
    ImageStep,
    LogChunk,
    Notice,
    StopApp,
    new_id,
)
from squall.protocol.records import replaced

if TYPE_CHECKING:
    from squall.app import App
    from squall.image import Image

SOURCE_MOUNT = "/src"
STOP_TIMEOUT = 90.0
INTERRUPTED_STOP_TIMEOUT = 10.0
# ---- importing what a reference names -----------------------------------------------------------------------------


def import_ref(ref: str, as_module: bool = False) -> tuple[ModuleType, str | None]:
    """Import `file.py`, `file.py::name` or, with `as_module`, `pkg.mod::name`; the module and the name, if any.

    What the user's own code raises while it is imported comes out as it is, with Squall's frames taken off.
    """
    target, _, name = ref.partition("::")
    load = _import_module if as_module else _import_file
    try:
        module = load(target)
    except Error:
        raise
    except BaseException as error:
        raise error.with_traceback(_users_part(error.__traceback__))
    return module, name or None


def _users_part(traceback: TracebackType | None) -> TracebackType | None:
    """Without the leading frames of Squall and of the import system."""
    own = os.path.dirname(os.path.abspath(__file__)) + os.sep
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not file.startswith((own, "<frozen importlib")) and f"{os.sep}importlib{os.sep}" not in file:
            return traceback
        traceback = traceback.tb_next
    return None


class _ScriptLoader(importlib.machinery.SourceFileLoader):
    """Compiles a script each time, as Python does. Bytecode beside it would be told apart by size and second only, and
    a program may well write a script, run it, and write the next one."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def _import_file(target: str) -> ModuleType:
    path = os.path.abspath(target)
    if not os.path.isfile(path):
        what = "it is a directory" if os.path.isdir(path) else "there is no such file"
        hint = "for a module on the import path, use `-m`" if not target.endswith(".py") else "check the path"
        raise NotFoundError(f"cannot run `{target}`: {what}", hint=hint)
    if not path.endswith(".py"):
        raise InvalidError(f"cannot run `{target}`: it is not a Python file", hint="its name must end in `.py`")
    directory, name = os.path.split(path)
    name = checked_module_name(name[:-3], path)
    if directory not in sys.path:
        sys.path.insert(0, directory)
    loader = _ScriptLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # as there is a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _import_module(target: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    if not target or target.endswith(".py") or "/" in target:
        raise InvalidError(f"`-m` takes the name of a module, not `{target}`", hint="write it as `package.module`")
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name and (target == error.name or target.startswith(error.name + ".")):
            raise NotFoundError(
                f"cannot run module `{target}`: there is no module `{error.name}` on the import path",
                hint="modules are looked for in the working directory and where Python's packages are",
            ) from None
        raise


# ---- specs on their way to the server -----------------------------------------------------------------------------


@dataclass
class Prepared:
    """Everything `CreateApp` needs, and the blobs that must be there before it."""

    specs: list[FunctionSpec] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    source_map: dict[str, str] = field(default_factory=dict)
    shared_main: set[str] = field(default_factory=set)
    """Tags of functions whose container imports the caller's `__main__` too."""
    warnings: list[str] = field(default_factory=list)


def prepare(app: App) -> Prepared:
    """Complete the specs of an app: import name, source bundle or function by value."""
    prepared = Prepared()
    bundles: dict[Origin, tuple[str, list[str]]] = {}
    app._packing = True
    try:
        for tag, spec in app._specs.items():
            origin = Origin() if tag in app._by_value else origin_of(spec.module)
            if not origin.module:
                prepared.specs.append(_by_value(app, spec, prepared))
                continue
            source, parts = "", list[str]()
            if origin.entry and tag not in app._without_source:
                key = replace(origin, module="", is_main=False)
                if key not in bundles:
                    bundles[key] = _add_bundle(prepared, make_bundle(origin))
                source, parts = bundles[key]
                prepared.source_map[SOURCE_MOUNT] = origin.root
            if origin.is_main:
                prepared.shared_main.add(tag)
                _alias_main(origin.module)
            prepared.specs.append(
                replaced(spec, module=origin.module, source=source, source_parts=parts, main_alias=origin.is_main)
            )
    finally:
        app._packing = False
    return prepared


def _by_value(app: App, spec: FunctionSpec, prepared: Prepared) -> FunctionSpec:
    data = payloads.pack_by_value(app._raw_of(spec.tag), f"`{spec.tag}`")
    return replaced(spec, module="", source="", serialized_blob=_add_blob(prepared, data))


def _add_bundle(prepared: Prepared, bundle: Bundle) -> tuple[str, list[str]]:
    """What names the bundle, and its parts where it has several."""
    if bundle.warning:
        prepared.warnings.append(bundle.warning)
    digests = [_add_blob(prepared, part) for part in bundle.parts]
    return (digests[0], []) if len(digests) == 1 else (clients.blob_digest("\n".join(digests).encode()), digests)


def _add_blob(prepared: Prepared, data: bytes) -> str:
    digest = clients.blob_digest(data)
    prepared.blobs[digest] = data
    return digest


def _alias_main(name: str) -> None:
    """Containers know the caller's `__main__` as `name`; results of its classes load here under that name."""
    sys.modules.setdefault(name, sys.modules["__main__"])


# ---- a running app ------------------------------------------------------------------------------------------------


@dataclass
class RunningApp:
    """An app the server knows, while this program follows it."""

    app_id: str
    client: Client
    functions: dict[str, str]
    source_map: dict[str, str]
    shared_main: set[str]

    def main_shared(self, tag: str) -> bool:
        return tag in self.shared_main


async def start_app(app: App, name: str, detach: bool, output: Output, is_interactive: bool = False) -> RunningApp:
    """Make the app on the server and hang its handles on it."""
    client = Client.current()
    prepared = await send_parts(app, client, output)
    terminal = _lend_terminal(client) if is_interactive else None
    if terminal is not None:
        output = Between(output, terminal)
    term = terminal.term if terminal is not None else ""
    # Its id is made here, so that the request may be repeated, now and when the connection is lost later.
    message = CreateApp(name, prepared.specs, detach=detach, terminal=term, app_id=new_id("ap"))
    reply, _ = await client.request(message)
    app_id = str(reply.data["app_id"])
    client.apps[app_id] = message
    client.follow(app_id, output)
    functions = dict(reply.data["functions"])
    return RunningApp(app_id, client, functions, prepared.source_map, prepared.shared_main)


async def send_parts(app: App, client: Client, output: Output) -> Prepared:
    """The complete specs of an app, once the server has its source and its images are built."""
    prepared = prepare(app)
    built: dict[Image, ImageSpec] = {}
    for spec in prepared.specs:
        image = app._images.get(spec.tag)
        if image is not None:
            if image not in built:
                built[image] = await _build(client, image, output, for_app=True)
            spec.image = built[image]
    for warning in prepared.warnings:
        output.notice(Notice("", "warning", {"reason": warning}))
    for data in prepared.blobs.values():
        await client.put_blob.aio(data)
    return prepared


def _lend_terminal(client: Client) -> Terminal:
    """Have this program's terminal given to the containers of an app that ask for it."""
    if client.terminal is not None:
        raise ConflictError(
            "another interactive app runs in this program", hint="one app at a time can have the terminal"
        )
    client.terminal = Terminal(client.link)
    return client.terminal


async def _build(client: Client, image: Image, output: Output, *, for_app: bool = False) -> ImageSpec:
    """Have the node build what is missing of an image; its recipe."""
    spec, blobs = image._resolve()
    for data in blobs.values():
        await client.put_blob.aio(data)
    client.follow(spec.image_id, output)
    try:
        # No timeout: the node holds each step to its deadline.
        await client.request(BuildImage(spec, image._secrets(), for_app), timeout=None)
    finally:
        client.unfollow(spec.image_id)
    return spec


def built_spec(image: Image, output: Output | None) -> ImageSpec:
    """Build an image that no app may use yet; its recipe."""
    if image._kind == "host":
        return image._spec
    return _blocking.run(_build(Client.current(), image, output or PlainOutput()))


def find_image(image_id: str) -> ImageSpec:
    """The recipe of an image the server knows. Raises NotFoundError."""
    reply, _ = _blocking.run(Client.current().request(GetImage(image_id)))
    steps = [ImageStep(**step) for step in reply.data["recipe"]]
    return ImageSpec("layers", steps, str(reply.data["image_id"]))


async def stop_app(running: RunningApp, reason: str, timeout: float) -> None:
    """End the app and wait, up to `timeout`, until its containers are gone and their last output was shown."""
    if not running.client.usable():
        return
    await running.client.request(StopApp(running.app_id, reason), timeout=timeout)


class AppRun:
    """What `app.run()` gives: `with` and `async with` run the app while the block lasts."""

    def __init__(
        self, app: App, *, name: str | None, detach: bool, output: Output | None, interactive: bool = False
    ) -> None:
        self.app = app
        self.name = checked_name(name, "app name") if name is not None else app.name or default_name(app)
        if not isinstance(detach, bool):
            raise InvalidError(f"`app.run(detach={detach!r})` takes True or False")
        if not isinstance(interactive, bool):
            raise InvalidError(f"`app.run(interactive={interactive!r})` takes True or False")
        if interactive:
            check_terminal()
        self.detach = detach
        self.interactive = interactive
        self.output = output

    def __enter__(self) -> App:
        _blocking.warn_if_in_loop("app.run", "use `async with app.run():`")
        return _blocking.run(self.__aenter__())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _blocking.run(self.__aexit__(kind, error, traceback))

    async def __aenter__(self) -> App:
        if not is_local():
            raise InvalidError(
                "`app.run()` was called in a container, while it imports your module",
                hint='put it under `if __name__ == "__main__":` or into a `@app.local_entrypoint()`',
            )
        if self.app._running is not None:
            raise ConflictError(f"{self.app!r} is running already", hint="leave its `with app.run():` block first")
        enabled = None if self.interactive else enabled_output()  # whose live view would fight for the terminal
        output = self.output or enabled or PlainOutput()
        try:
            self.app._running = await start_app(self.app, self.name, self.detach, output, self.interactive)
        except BaseException:
            self.take_terminal_back()
            raise
        return self.app

    def take_terminal_back(self) -> None:
        """From the container that has it. Idempotent."""
        if not self.interactive:
            return
        client = Client.current()
        terminal, client.terminal = client.terminal, None
        if terminal is not None:
            terminal.close()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        running = self.app._running
        if running is None:
            return
        self.take_terminal_back()
        interrupted = kind is not None and not issubclass(kind, Exception)
        try:
            if not self.detach:
                reason = "interrupted" if interrupted else "the program is done with it"
                await stop_app(running, reason, INTERRUPTED_STOP_TIMEOUT if interrupted else STOP_TIMEOUT)
        except Error:
            if error is None:  # else the user's own exception is what they must see
                raise
        finally:
            self.app._running = None
            running.client.apps.pop(running.app_id, None)
            running.client.unfollow(running.app_id)


def default_name(app: App) -> str:
    """The script's name, or that of a function's module, made to fit."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    modules = [spec.module for spec in app._specs.values() if spec.module != "__main__"]
    stem = modules[0].rpartition(".")[2] if modules else os.path.splitext(os.path.basename(main or "app"))[0]
    return "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "-" for c in stem)[:64] or "app"


class PlainOutput:
    """Containers' bytes as they are on this program's stdout and stderr; what is wrong on stderr."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: set[str] = set()

    def log(self, chunk: LogChunk, data: bytes) -> None:
        self._write(sys.stdout if chunk.stream == "stdout" else sys.stderr, data)

    def notice(self, notice: Notice) -> None:
        said = _NOTICES.get(notice.kind)
        if said is not None and notice.data.get("reason"):
            text = said.format(function=notice.data.get("function", ""), reason=notice.data["reason"])
            if text not in self._said:
                self._said.add(text)
                self._write(sys.stderr, f"squall: {text}\n".encode())

    def _write(self, stream: Any, data: bytes) -> None:
        with self._lock:
            try:
                stream.flush()
                raw = getattr(stream, "buffer", None)
                if raw is not None:
                    raw.write(data)
                else:  # a notebook's, or a test's: text only
                    stream.write(data.decode("utf-8", "replace"))
                stream.flush()
            except (OSError, ValueError):  # closed, or its reader is gone: output has no place to go
                pass


_NOTICES = {
    "build": "image step {reason}",
    "stopped": "the app was stopped: {reason}",
    "waiting": "`{function}` is waiting: {reason}",
    "backoff": "containers of `{function}` keep failing: {reason}",
    "warning": "warning: {reason}",
}
