"""User values as bytes: arguments, results and exceptions with tracebacks, on both sides of a call.

A packed value is a plain pickle (protocol 5, whose first byte is 0x80), or one tag byte and data: `c` cloudpickle (by
value: lambdas, local and `__main__` definitions), `e` an exception. Plain pickle is tried first, it is ten times
faster. The copy of cloudpickle used is a private one, so that what users pin, patch or register never meets ours.

An exception travels as its own pickle, plus what pickle drops: notes, causes, and its traceback as plain lines, from
which `unpack_exception` builds traceback objects that print the user's source. What cannot be rebuilt becomes a
RemoteError that says why. Everything read here comes from a container and may be broken or hostile in size: counts
and lengths are bounded, and no failure of a user's `__reduce__` or `__str__` may leave as anything but
SerializationError or RemoteError. The server must never import this module. Tested in `tests/unit/test_payload.py`.
"""

from __future__ import annotations

import _thread
import builtins
import itertools
import linecache
import os
import pickle
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from squall.exception import Error, RemoteError, SerializationError
from squall.protocol.frames import Packed, Pieces, flat

PLAIN, BY_VALUE, EXCEPTION = b"\x80", b"c", b"e"

TEXT_LIMIT = 64 << 10
"""Characters of an exception's message or formatted traceback that travel."""
EXCEPTION_LIMIT_BYTES = 64 << 20
"""A pickled exception above this comes back as a RemoteError."""
FRAMES_LIMIT = 256
CHAIN_LIMIT = 64
LINES_LIMIT = 200_000
"""Line number above which no source is kept for files that are missing here."""

HINT_UNPICKLABLE = (
    "open files, locks, connections, threads and generators cannot travel; make them inside the function, "
    "or pass what they are made from"
)

_OWN_DIR = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_IMPORT_SYSTEM = ("<frozen importlib", os.path.join(os.path.dirname(os.__file__), "importlib", ""))
"""Files whose frames say nothing to anybody; Python leaves them out of what it prints, too."""
_MAIN = b"__main__"
_ATOMS = frozenset((bytes, str, int, float, bool, type(None)))
"""What cannot hold anything of `__main__`: looking for the name in 100 KB takes as long as pickling them."""

LARGE_BYTES = 1 << 16
"""From here on a pickler gives bytes to its file as they are (since Python 3.7)."""
_LOOKS = 16
"""Members of a list, tuple or dict that are looked at."""


# ---- values -----------------------------------------------------------------------------------------------------


def pack(value: Any, what: str, *, main_by_value: bool = True) -> bytes:
    """`value` as bytes. `what` names it in errors: "the result of `square`".

    With `main_by_value`, things defined in `__main__` are sent by value, because the other side has another one.
    """
    return bytes(pack_in_pieces(value, what, main_by_value=main_by_value))


def pack_in_pieces(value: Any, what: str, *, main_by_value: bool = True) -> Packed:
    """As `pack`. Large `bytes` in it are not copied: they are pieces of what is returned."""
    try:
        data = _dumps(value, (value,))
    except Exception:
        return BY_VALUE + _dumps_by_value(value, what)
    if main_by_value and type(value) not in _ATOMS and _names_main(data):
        try:
            return BY_VALUE + bytes(_cloudpickle().dumps(value, 5))
        except Exception:  # only the text `__main__` was in there, beside something plain pickle alone can do
            return data
    return data


def _dumps(value: Any, members: Iterable[Any]) -> Packed:
    """A plain pickle of `value`, which has those `members`. A pickler that writes to a file costs 1.3 us more, and
    spares one copy of each large member, or two with the memory for it."""
    if not any(map(_is_large, members)):
        return pickle.dumps(value, 5)
    pieces = Pieces()
    pickle.Pickler(pieces, 5).dump(value)
    return pieces


def _is_large(value: Any, *, within: bool = True) -> bool:
    """Whether there are large bytes in it, as far as that can be seen at once. Runs no code of the user's."""
    kind = type(value)
    if kind in (bytes, bytearray, str):
        return len(value) >= LARGE_BYTES
    if within and kind in (tuple, list, dict):
        members = value.values() if kind is dict else value
        return any(_is_large(member, within=False) for member in itertools.islice(members, _LOOKS))
    return kind.__name__ == "ndarray" and kind.__module__ == "numpy" and value.nbytes >= LARGE_BYTES


def _names_main(data: Packed) -> bool:
    return _MAIN in data if type(data) is bytes else any(_MAIN in part for part in flat((data,)))


def _dumps_by_value(value: Any, what: str) -> bytes:
    try:
        return _cloudpickle().dumps(value, 5)  # type: ignore[no-any-return]
    except Exception as error:
        raise SerializationError(_explain(value, what, error), hint=HINT_UNPICKLABLE) from None


def unpack(data: bytes | memoryview, what: str) -> Any:
    """The value packed in `data`. Raises SerializationError, naming `what`."""
    view = memoryview(data)
    tag = view[:1]
    if tag == BY_VALUE:
        _cloudpickle()
    elif tag != PLAIN:
        raise SerializationError(f"cannot load {what}: it is not a packed value (tag {bytes(tag)!r})")
    try:
        return pickle.loads(view if tag == PLAIN else view[1:])
    except Exception as error:
        raise SerializationError(f"cannot load {what}: {_reason(error)}", hint=_loading_hint(error)) from error


def _loading_hint(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return (
            f"module `{error.name}` must be importable on both sides, in your program and in the image;"
            " or pass plain values: numbers, text, lists, bytes"
        )
    if isinstance(error, AttributeError):
        return "the module that defines its type differs between your program and the container"
    return "its type must be the same, and its `__setstate__` or `__reduce__` must work, on both sides"


def pack_call(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    name: str,
    parameters: Sequence[str] = (),
    *,
    main_by_value: bool = True,
) -> bytes:
    """The arguments of one input. `name` is the function's and `parameters` its parameter names, for errors."""
    return bytes(pack_call_in_pieces(args, kwargs, name, parameters, main_by_value=main_by_value))


def pack_call_in_pieces(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    name: str,
    parameters: Sequence[str] = (),
    *,
    main_by_value: bool = True,
) -> Packed:
    """As `pack_call`. Large `bytes` among them are not copied: they are pieces of what is returned."""
    try:
        data = _dumps((args, kwargs), (*args, *kwargs.values()) if kwargs else args)
    except Exception:
        return _pack_call_by_value(args, kwargs, name, parameters)
    if main_by_value and not (_ATOMS.issuperset(map(type, args)) and not kwargs) and _names_main(data):
        return pack((args, kwargs), f"the arguments of `{name}`")
    return data


class _Digest:
    """A file that keeps only the digest of what is written to it, up to a size."""

    def __init__(self, limit: int) -> None:
        import hashlib

        self._hash = hashlib.blake2b(digest_size=32)
        self._left = limit

    def write(self, data: Any) -> int:
        self._left -= len(data)
        if self._left < 0:
            raise ValueError("too large")
        self._hash.update(data)
        return len(data)

    def text(self) -> str:
        return self._hash.hexdigest()


def digest_call(args: tuple[Any, ...], kwargs: dict[str, Any], packed: Packed) -> str:
    """What stands for the arguments of an input, wherever they are made again. Packed without the memory by which a
    pickle names what it has seen before, as that depends on which equal values are one object; or, where that fails, as
    they are `packed`."""
    digest = _Digest(4 * len(packed) + (1 << 16))  # without memory, what is shared deeply grows without bound
    pickler = pickle.Pickler(digest, 5)
    pickler.fast = True
    try:
        pickler.dump((args, sorted(kwargs.items())))
    except Exception:  # what holds itself, or travels by value
        digest = _Digest(len(packed))
        digest.write(bytes(packed))
    return digest.text()


def _pack_call_by_value(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, parameters: Sequence[str]) -> bytes:
    try:
        return BY_VALUE + _cloudpickle().dumps((args, kwargs), 5)  # type: ignore[no-any-return]
    except Exception:
        for i, value in enumerate(args):
            label = parameters[i] if i < len(parameters) else str(i)
            _dumps_by_value(value, f"argument `{label}` of `{name}`")
        for key, value in kwargs.items():
            _dumps_by_value(value, f"argument `{key}` of `{name}`")
        return BY_VALUE + _dumps_by_value((args, kwargs), f"the arguments of `{name}`")


def unpack_call(data: bytes | memoryview, name: str = "the function") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments packed by `pack_call`. Raises SerializationError."""
    call = unpack(data, f"the arguments of `{name}`")
    if type(call) is not tuple or len(call) != 2 or type(call[0]) is not tuple or type(call[1]) is not dict:
        raise SerializationError(f"cannot load the arguments of `{name}`: they are not packed arguments")
    return call


def pack_by_value(value: Any, what: str) -> bytes:
    """As `pack`, but always by value: for a function whose module the container cannot import.

    What else that module defines goes along by value as well, as far as the function refers to it.
    """
    own = _users_module(value)
    registered: set[str] = _cloudpickle()._PICKLE_BY_VALUE_MODULES
    if not own or own in registered:
        return BY_VALUE + _dumps_by_value(value, what)
    registered.add(own)
    try:
        return BY_VALUE + _dumps_by_value(value, what)
    finally:
        registered.discard(own)


def _users_module(value: Any) -> str:
    """The module that defines a function or class, or the package it is in; nothing for an installed one."""
    if not isinstance(value, (types.FunctionType, type)):
        return ""
    name = value.__module__ or ""
    file = getattr(sys.modules.get(name), "__file__", None)
    installed = [os.path.join(os.path.abspath(prefix), "lib", "") for prefix in (sys.prefix, sys.base_prefix)]
    if name == "__main__" or not file or os.path.abspath(file).startswith((*installed, _OWN_DIR)):
        return ""
    return name.partition(".")[0]


_PRIVATE_NAME = "squall._cloudpickle"
_loading = _thread.allocate_lock()


def _cloudpickle() -> Any:
    """Our own copy of the installed cloudpickle, under a private module name that its pickles refer to."""
    module: Any = sys.modules.get(_PRIVATE_NAME)
    if module is None or not hasattr(module, "dumps"):
        with _loading:
            module = sys.modules.get(_PRIVATE_NAME) or _load_cloudpickle()
    theirs = sys.modules.get("cloudpickle.cloudpickle")
    if theirs is not None:  # what the user asked their copy to send by value, ours sends by value too
        module._PICKLE_BY_VALUE_MODULES = theirs._PICKLE_BY_VALUE_MODULES
    return module


def _load_cloudpickle() -> Any:
    import importlib.util

    package = importlib.util.find_spec("cloudpickle")
    if package is None or not package.submodule_search_locations:
        raise SerializationError(
            "cannot pickle or load by value: package `cloudpickle` is not installed here",
            hint="install cloudpickle in the image, or define the function and its types in a module",
        )
    path = os.path.join(package.submodule_search_locations[0], "cloudpickle.py")
    spec = importlib.util.spec_from_file_location(_PRIVATE_NAME, path)
    if spec is None or spec.loader is None:
        raise SerializationError(f"cannot pickle or load by value: `{path}` cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_PRIVATE_NAME] = module
    spec.loader.exec_module(module)
    return module


# ---- naming what cannot be pickled ------------------------------------------------------------------------------


def _explain(value: Any, what: str, error: Exception) -> str:
    head = f"cannot pickle {what} (a `{_type_name(type(value))}`)"
    if "recursion" in f"{type(error).__name__} {error}".lower():
        return f"{head}: it is nested too deeply"
    try:
        found = _culprit(value, "", 6, [500])
    except Exception:  # a hostile `__iter__` or `__dict__`: the plain reason must do
        found = None
    if found is None or not found[0]:
        return f"{head}: {_reason(error)}"
    path, inner, reason = found
    return f"{head}: in it, `{path.lstrip('.')}` is a `{_type_name(type(inner))}`: {reason}"


def _culprit(value: Any, path: str, depth: int, budget: list[int]) -> tuple[str, Any, str] | None:
    """The innermost part of `value` that cannot be pickled, its path and the reason."""
    budget[0] -= 1
    if budget[0] < 0:
        return None
    try:
        _cloudpickle().dumps(value, 5)
        return None
    except Exception as error:
        reason = _reason(error)
    if depth:
        for step, inner in _parts(value):
            found = _culprit(inner, path + step, depth - 1, budget)
            if found is not None:
                return found
    return path, value, reason


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (list, tuple)):
        yield from ((f"[{i}]", inner) for i, inner in enumerate(value))
    elif isinstance(value, dict):
        yield from ((f"[{_short(key)}]", inner) for key, inner in value.items())
    elif isinstance(value, (set, frozenset)):
        yield from (("{...}", inner) for inner in value)
    elif isinstance(value, types.FunctionType):
        used = value.__code__.co_names
        yield from ((f".{name}", value.__globals__[name]) for name in used if name in value.__globals__)
        yield from (
            (f".{name}", cell.cell_contents)
            for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        )
    else:
        state = getattr(value, "__dict__", None)
        if type(state) is dict:
            yield from ((f".{name}", inner) for name, inner in state.items())


def _short(key: Any) -> str:
    text = repr(key)
    return text if len(text) <= 40 else text[:37] + "..."


def _type_name(cls: type) -> str:
    module = getattr(cls, "__module__", "")
    name = getattr(cls, "__qualname__", str(cls))
    return name if module in ("builtins", "__main__", "") else f"{module}.{name}"


def _reason(error: BaseException) -> str:
    text = _text_of(error)
    name = type(error).__name__
    if isinstance(error, (pickle.PicklingError, TypeError)) and text:
        return text
    return f"{name}: {text}" if text else name


def _text_of(error: BaseException) -> str:
    try:
        return str(error)[:TEXT_LIMIT]
    except Exception as inner:
        return f"<its message cannot be shown: {type(inner).__name__}>"


# ---- exceptions: packing ------------------------------------------------------------------------------------------


def pack_exception(error: BaseException) -> bytes:
    """`error` with its causes, notes and traceback lines. Never raises for anything a user's exception does."""
    entries: list[dict[str, Any]] = []
    try:
        _add_entry(error, entries, {})
    except Exception as failure:  # its own attributes raise when they are read
        why = f"it cannot be read: {_reason(failure)}"
        entries = [{**_BARE_ENTRY, "type": _type_name(type(error)), "message": _text_of(error), "why": why}]
    return EXCEPTION + pickle.dumps(entries, 5)


_BARE_ENTRY: dict[str, Any] = {
    "type": "", "message": "", "frames": [], "notes": [], "suppress": False, "value": b"", "why": "", "text": "",
    "cause": -1, "context": -1, "members": [],
}  # fmt: skip


def _add_entry(error: BaseException, entries: list[dict[str, Any]], seen: dict[int, int]) -> int:
    """Append `error` and what it hangs together with; its place in `entries`, or -1 when the chain is too long."""
    if id(error) in seen:
        return seen[id(error)]
    if len(entries) >= CHAIN_LIMIT:
        return -1
    index = seen[id(error)] = len(entries)
    entry: dict[str, Any] = {
        "type": _type_name(type(error)),
        "message": _text_of(error),
        "frames": _frames_of(error.__traceback__),
        "notes": [str(note)[:TEXT_LIMIT] for note in _notes_of(error)],
        "suppress": error.__suppress_context__,
    }
    entries.append(entry)
    entry["value"], entry["why"] = _pack_own(error)
    entry["text"] = _format(error) if entry["why"] else ""
    for key, other in (("cause", error.__cause__), ("context", error.__context__)):
        entry[key] = -1 if other is None else _add_entry(other, entries, seen)
    entry["members"] = [_add_entry(member, entries, seen) for member in _members_of(error)[:CHAIN_LIMIT]]
    return index


def _notes_of(error: BaseException) -> list[Any]:
    notes = getattr(error, "__notes__", None)
    return notes[:CHAIN_LIMIT] if type(notes) is list else []


def _members_of(error: BaseException) -> tuple[Any, ...]:
    """The exceptions of an exception group, else nothing."""
    group = getattr(builtins, "BaseExceptionGroup", None)
    return error.exceptions if group is not None and isinstance(error, group) else ()


def _pack_own(error: BaseException) -> tuple[bytes, str]:
    """The exception itself and "", or nothing and the reason why it cannot travel."""
    if not isinstance(error, Exception):
        return b"", f"`{type(error).__name__}` would end the caller's program"
    try:
        data = pack(_state_of(error), f"exception `{_type_name(type(error))}`")
    except Exception as failure:
        return b"", failure.message if isinstance(failure, Error) else _reason(failure)
    if len(data) > EXCEPTION_LIMIT_BYTES:
        return b"", f"it is {len(data) >> 20} MiB when pickled, the limit is {EXCEPTION_LIMIT_BYTES >> 20} MiB"
    return data, ""


def _state_of(error: Exception) -> Any:
    """`(class, args, attributes)` for an exception with no pickling of its own, else the exception.

    Pickle would rebuild the former by calling the class with `args`, which fails or lies for every exception whose
    `__init__` takes something else than it hands to `super().__init__`.
    """
    cls = type(error)
    own_pickling = any(
        isinstance(getattr(cls, name, None), types.FunctionType)
        for name in ("__reduce__", "__reduce_ex__", "__setstate__", "__getstate__", "__getnewargs__")
    )
    if own_pickling:
        return error
    if _members_of(error):
        return cls, (error.args[0],), vars(error)  # its members are entries of their own
    reduced: Any = error.__reduce__()
    if type(reduced) is not tuple or len(reduced) > 3 or reduced[0] is not cls or type(reduced[1]) is not tuple:
        return error
    return cls, reduced[1], reduced[2] if len(reduced) == 3 else None


def _frames_of(traceback: types.TracebackType | None) -> list[tuple[Any, ...]]:
    """The traceback as `(file, function, line, end line, column, end column, source line)`, the user's frames only."""
    frames: list[tuple[Any, ...]] = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if not code.co_filename.startswith((_OWN_DIR, *_IMPORT_SYSTEM)):
            frames.append(_frame_of(traceback, code))
        traceback = traceback.tb_next
    if len(frames) > FRAMES_LIMIT:
        frames = frames[: FRAMES_LIMIT // 2] + frames[-FRAMES_LIMIT // 2 :]
    return frames


def _frame_of(traceback: types.TracebackType, code: types.CodeType) -> tuple[Any, ...]:
    line, end_line, column, end_column = traceback.tb_lineno, None, None, None
    if sys.version_info >= (3, 11) and traceback.tb_lasti >= 0:
        for i, position in enumerate(code.co_positions()):
            if i == traceback.tb_lasti // 2:
                _, end_line, column, end_column = position
                break
    text = linecache.getline(code.co_filename, line, traceback.tb_frame.f_globals).rstrip("\n")[:1000]
    return code.co_filename, code.co_name, line, end_line, column, end_column, text


def _format(error: BaseException) -> str:
    """The traceback as text, for when no exception object can show it."""
    import traceback

    try:
        lines = traceback.format_exception(type(error), error, error.__traceback__, chain=False)
    except Exception as failure:
        return f"<its traceback cannot be shown: {type(failure).__name__}>"
    text = "".join(lines)
    return text if len(text) <= TEXT_LIMIT else text[: TEXT_LIMIT // 2] + "\n...\n" + text[-TEXT_LIMIT // 2 :]


# ---- exceptions: unpacking ----------------------------------------------------------------------------------------


def unpack_exception(
    data: bytes | memoryview, name: str = "", source_map: Mapping[str, str] | None = None
) -> BaseException:
    """The exception packed in `data`: its own type where possible, else a RemoteError that tells about it.

    `name` is the function's. `source_map` maps directories of the container (`/src`) to the caller's, so that the
    traceback names files that exist here. Never raises.
    """
    where = f"`{name}`" if name else "the function"
    try:
        if memoryview(data)[:1] != EXCEPTION:
            raise ValueError("it is not a packed exception")
        entries = pickle.loads(memoryview(data)[1:])
        rebuilt: dict[int, BaseException] = {}
        for index in reversed(range(min(len(entries), CHAIN_LIMIT))):  # a group comes before its members
            rebuilt[index] = _rebuild(entries[index], where, source_map or {}, rebuilt)
        for index, error in rebuilt.items():
            _tie(entries[index], error, rebuilt)
        return rebuilt[0]
    except Exception as failure:
        return RemoteError(f"{where} raised an exception that cannot be shown here: {_reason(failure)}")


def _rebuild(
    entry: Mapping[str, Any], where: str, source_map: Mapping[str, str], later: Mapping[int, BaseException]
) -> BaseException:
    why = entry["why"]
    error: BaseException | None = None
    if not why:
        try:
            members = [later[index] for index in entry["members"] if index in later]
            error = _from_state(unpack(entry["value"], "it"), members)
        except Exception as failure:
            why = failure.message if isinstance(failure, Error) else f"cannot load it: {_reason(failure)}"
    if error is None:
        error = _stand_in(entry, where, why)
    error.__traceback__ = _build_traceback(entry["frames"], source_map)
    return error


def _stand_in(entry: Mapping[str, Any], where: str, why: str) -> RemoteError:
    """A RemoteError in place of an exception that cannot be had here."""
    said = f"`{entry['type']}`" + (f": {entry['message']}" if entry["message"] else "")
    error = RemoteError(
        f"{where} raised {said}",
        hint=f"it is shown as RemoteError because the original could not be brought here: {why}",
    )
    error.remote_type = str(entry["type"])
    error.remote_traceback = str(entry["text"])
    return error


def _from_state(state: Any, members: list[BaseException]) -> BaseException:
    if isinstance(state, Exception):
        return state
    cls, args, attributes = state
    if not (isinstance(cls, type) and issubclass(cls, Exception)):
        raise TypeError(f"`{cls!r}` is no exception class")
    if members:
        args = (*args, members)
    # `__new__` and `__init__` of the nearest C class only: they fill what C code reads (errno, value, encoding ...)
    # and the Python ones, which may want other arguments, have had their say when it was raised.
    static = next(base for base in cls.__mro__ if not base.__flags__ & _HEAP_TYPE)
    error: BaseException = static.__new__(cls, *args)
    static.__init__(error, *args)  # type: ignore[misc]  # unsound for instances of subclasses, and wanted
    if error.args != args and not isinstance(error, OSError):
        error.args = args
    if attributes:
        error.__setstate__(attributes)
    return error


_HEAP_TYPE = 1 << 9


def _tie(entry: Mapping[str, Any], error: BaseException, rebuilt: Mapping[int, BaseException]) -> None:
    """Give back what is not in the pickle: cause, context and notes."""
    error.__cause__ = rebuilt.get(entry["cause"])
    error.__context__ = rebuilt.get(entry["context"])
    error.__suppress_context__ = bool(entry["suppress"])
    if entry["notes"] and not getattr(error, "__notes__", None):
        error.__notes__ = list(entry["notes"])  # type: ignore[attr-defined]


class _Stop(Exception):
    """Raised by the code that stands for a remote frame."""


_TEMPLATE = compile("raise stop", "<remote>", "exec")


def _build_traceback(frames: Sequence[tuple[Any, ...]], source_map: Mapping[str, str]) -> types.TracebackType | None:
    traceback: types.TracebackType | None = None
    sources: dict[str, dict[int, str]] = {}
    for file, name, line, end_line, column, end_column, text in reversed(frames[:FRAMES_LIMIT]):
        local = _map_path(str(file), source_map)
        line = min(max(int(line), 1), 1 << 30)
        sources.setdefault(local, {})[line] = str(text)
        code = _TEMPLATE.replace(co_filename=local, co_name=str(name), co_firstlineno=line)
        if sys.version_info >= (3, 11):
            table = _line_table(len(code.co_code) // 2, line, end_line, column, end_column)
            code = code.replace(co_linetable=table, co_qualname=str(name))
        frame = _frame_for(code)
        traceback = types.TracebackType(traceback, frame, frame.f_lasti, line)
    for local, lines in sources.items():
        _remember_source(local, lines)
    return traceback


def _frame_for(code: types.CodeType) -> types.FrameType:
    try:
        exec(code, {"stop": _Stop(), "__name__": code.co_name, "__file__": code.co_filename})
    except _Stop as stop:
        traceback = stop.__traceback__
        if traceback is not None and traceback.tb_next is not None:
            return traceback.tb_next.tb_frame
    raise RuntimeError("the frame template did not raise")


def _line_table(units: int, line: int, end_line: Any, column: Any, end_column: Any) -> bytes:
    """A code object's location table (PEP 626, "long form") that puts every instruction at one place."""
    known = all(isinstance(n, int) and 0 <= n < 1 << 20 for n in (column, end_column))
    lines = end_line - line if isinstance(end_line, int) and line <= end_line < line + (1 << 16) else -1
    if known and lines >= 0:
        body = b"\0" + _varint(lines) + _varint(column + 1) + _varint(end_column + 1)
        kind = 14
    else:
        body, kind = b"\0", 13
    table = b""
    while units > 0:
        step = min(units, 8)
        table += bytes([0x80 | kind << 3 | step - 1]) + body
        units -= step
    return table


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 64:
        out.append(64 | value & 63)
        value >>= 6
    out.append(value)
    return bytes(out)


def _map_path(file: str, source_map: Mapping[str, str]) -> str:
    for remote, local in source_map.items():
        if file.startswith(remote + "/"):
            return os.path.join(local, file[len(remote) + 1 :])
    return file


def _remember_source(file: str, lines: Mapping[int, str]) -> None:
    """Let `traceback` and `pdb` find the lines of a file that is not on this machine."""
    if file in linecache.cache and linecache.cache[file][0] is not _REMOTE:
        return
    known = linecache.cache.get(file)
    if known is None and (os.path.exists(file) or not any(lines.values())):
        return
    texts: list[str] = list(known[2]) if known is not None and len(known) == 4 else []
    for line, text in lines.items():
        if line <= LINES_LIMIT:
            texts.extend(["\n"] * (line - len(texts)))
            texts[line - 1] = text + "\n"
    linecache.cache[file] = (_REMOTE, None, texts, file)


class _Remote(int):
    """The size of a file in linecache, and the mark that we put it there (entries without mtime are never checked)."""


_REMOTE = _Remote(0)
