"""Values and exceptions survive the trip, and what cannot travel is named."""

from __future__ import annotations

import builtins
import dataclasses
import importlib
import linecache
import pickle
import subprocess
import sys
import textwrap
import threading
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from squall.exception import FunctionTimeoutError, RemoteError, SerializationError
from squall.protocol import payload
from squall.protocol.frames import Pieces


@dataclasses.dataclass
class Point:
    x: int
    y: int


class AwkwardError(Exception):
    """Takes other arguments than it hands to its base, as most errors in the wild do."""

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code


class HostileError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text from me")

    def __reduce__(self) -> Any:
        raise RuntimeError("no pickle from me")


def caught(body: Callable[[], Any]) -> BaseException:
    try:
        body()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def through(error: BaseException, **options: Any) -> BaseException:
    return payload.unpack_exception(payload.pack_exception(error), "f", **options)


def printed(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


# ---- values


@pytest.mark.parametrize("value", [None, 7, "ü", b"\0" * 70_000, [1, {"a": (2,)}], Point(1, 2), {1, 2}])
def test_plain_values_survive_as_plain_pickle(value: object) -> None:
    data = payload.pack(value, "it")
    assert data[:1] == payload.PLAIN
    assert payload.unpack(data, "it") == value


def test_lambda_with_a_closure_travels_by_value() -> None:
    factor = 3
    data = payload.pack(lambda x: x * factor, "it")
    assert data[:1] == payload.BY_VALUE
    assert payload.unpack(data, "it")(4) == 12


def test_pickles_by_value_load_under_the_private_name_of_our_own_cloudpickle() -> None:
    data = payload.pack(lambda: 1, "it")
    assert b"squall._cloudpickle" in data
    assert b"\x0bcloudpickle" not in data


MODULE = """
import dataclasses

@dataclasses.dataclass
class Pair:
    left: int

def double(pair):
    return Pair(2 * pair.left)

def run():
    return double(Pair(21)).left
"""


def test_function_of_a_users_module_travels_with_what_its_module_defines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    run = importlib.import_module("only_here").run
    packed = payload.pack_by_value(run, "`run`")
    assert b"only_here" in payload.pack(run, "`run`")  # by reference, as everything else still is
    load = "import sys; from squall.protocol import payload; print(payload.unpack(sys.stdin.buffer.read(), 'it')())"
    done = subprocess.run([sys.executable, "-c", load], input=packed, capture_output=True, timeout=60, check=True)
    assert done.stdout == b"42\n"


def test_class_defined_in_main_travels_by_value_unless_main_is_shared() -> None:
    program = """
        from squall.protocol import payload
        class Local: pass
        print(payload.pack(Local(), "it")[:1], payload.pack(Local(), "it", main_by_value=False)[:1])
        assert isinstance(payload.unpack(payload.pack(Local(), "it"), "it"), Local)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "b'c' b'\\x80'"


def test_text_main_in_a_value_is_harmless() -> None:
    assert payload.unpack(payload.pack({"name": "__main__"}, "it"), "it") == {"name": "__main__"}


def test_call_survives_with_positions_and_names() -> None:
    data = payload.pack_call((1, "b"), {"c": [2]}, "f")
    assert payload.unpack_call(data, "f") == ((1, "b"), {"c": [2]})


def test_unpicklable_argument_is_named_with_its_path_and_reason() -> None:
    with pytest.raises(SerializationError) as caught_error:
        payload.pack_call((1, [{"a": threading.Lock()}]), {}, "square", ("n", "x"))
    error = caught_error.value
    assert "argument `x` of `square` (a `list`): in it, `[0]['a']` is a `_thread.lock`" in error.message
    assert "make them inside the function" in error.hint


def test_unpicklable_keyword_argument_is_named() -> None:
    with pytest.raises(SerializationError, match="argument `key` of `f`"):
        payload.pack_call((), {"key": (i for i in range(3))}, "f")


def test_unpicklable_attribute_deep_inside_is_named() -> None:
    outer = Point(1, 2)
    outer.y = Point(1, threading.Lock())  # type: ignore[assignment, arg-type]
    with pytest.raises(SerializationError, match=r"`y\.y` is a `_thread\.lock`"):
        payload.pack(outer, "the result of `f`")


SOME_LOCK = threading.Lock()


def uses_a_lock() -> object:
    return SOME_LOCK


def test_global_that_keeps_a_function_from_travelling_is_named() -> None:
    function = types.FunctionType(uses_a_lock.__code__, {"SOME_LOCK": SOME_LOCK}, "made_here")
    with pytest.raises(SerializationError, match=r"function `f`.*`SOME_LOCK` is a `_thread\.lock`"):
        payload.pack_by_value(function, "function `f`")


def test_value_nested_too_deeply_is_an_error_and_no_crash() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(SerializationError, match="nested too deeply"):
        payload.pack(value, "it")


def test_missing_module_is_named_when_a_value_cannot_be_loaded() -> None:
    data = payload.PLAIN + b"\x05cno_such_module\nThing\n."
    with pytest.raises(SerializationError, match=r"cannot load the result of `f`.*no_such_module") as error:
        payload.unpack(data, "the result of `f`")
    assert "importable on both sides" in error.value.hint


@pytest.mark.parametrize("data", [b"", b"x", b"p", b"pgarbage", b"c\x80", b"\xff\xff", b"e\x80\x05N."])
def test_damaged_bytes_are_a_serialization_error(data: bytes) -> None:
    with pytest.raises(SerializationError):
        payload.unpack(data, "it")
    with pytest.raises(SerializationError):
        payload.unpack_call(data, "f")


# ---- exceptions


def test_exception_keeps_type_arguments_and_attributes() -> None:
    error = through(caught(lambda: (_ for _ in ()).throw(AwkwardError(7, detail="x"))))
    assert type(error) is AwkwardError
    assert (error.args, error.code) == (("7: x",), 7)


@pytest.mark.parametrize(
    "error",
    [
        OSError(2, "gone", "file"),
        UnicodeDecodeError("utf8", b"\xff", 0, 1, "bad"),
        KeyError("k"),
        SyntaxError("no", ("f.py", 3, 1, "x =", 3, 2)),
        StopIteration(4),
        FunctionTimeoutError("slow", hint="less"),
        SerializationError("no"),
    ],
)
def test_builtin_and_own_errors_keep_what_their_c_fields_hold(error: Exception) -> None:
    back = through(error)
    assert (type(back), back.args, str(back)) == (type(error), error.args, str(error))


def fail_with_cause() -> None:
    try:
        {"here": 1}["missing"]
    except KeyError as error:
        raise AwkwardError(1, detail="outer") from error


def test_cause_and_its_traceback_come_along() -> None:
    error = through(caught(fail_with_cause))
    assert isinstance(error.__cause__, KeyError)
    text = printed(error)
    assert '{"here": 1}["missing"]' in text
    assert 'raise AwkwardError(1, detail="outer") from error' in text
    assert "in fail_with_cause" in text


def test_exception_in_its_own_chain_does_not_loop() -> None:
    one, two = ValueError(1), ValueError(2)
    one.__context__, two.__context__ = two, one
    back = through(one)
    assert back.__context__ is not None and back.__context__.__context__ is back


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11")
def test_notes_come_along() -> None:
    error = ValueError("x")
    vars(error)["__notes__"] = ["while testing"]  # what `add_note` does, which 3.10 has not
    assert vars(through(error))["__notes__"] == ["while testing"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with Python 3.11")
def test_exception_group_keeps_its_members_tracebacks() -> None:
    def raise_group() -> None:
        group = getattr(builtins, "ExceptionGroup")  # noqa: B009  (Python 3.10 has none)
        raise group("several", [caught(fail_with_cause), ValueError("b")])

    text = printed(through(caught(raise_group)))
    assert "in fail_with_cause" in text and "ValueError: b" in text


def test_file_of_the_source_mount_is_mapped_to_the_callers() -> None:
    code = compile("def f():\n    raise ValueError('here')\n", "/src/pkg/mod.py", "exec")
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    error = through(caught(namespace["f"]), source_map={"/src": "/elsewhere/project"})
    assert 'File "/elsewhere/project/pkg/mod.py", line 2, in f' in printed(error)


def test_source_line_is_shown_though_its_file_is_not_here() -> None:
    name = "/nowhere/only_in_container.py"
    linecache.cache[name] = (0, None, ["def f():\n", "    raise ValueError('lost')\n"], name)
    namespace: dict[str, Any] = {}
    exec(compile("def f():\n    raise ValueError('lost')\n", name, "exec"), namespace)
    data = payload.pack_exception(caught(namespace["f"]))
    del linecache.cache[name]
    assert "    raise ValueError('lost')" in printed(payload.unpack_exception(data, "f"))


def test_squalls_own_frames_are_left_out() -> None:
    error = caught(lambda: payload.unpack(b"junk", "it"))
    assert "squall/protocol" not in printed(through(error))


def test_unpicklable_exception_becomes_a_remote_error_that_says_why() -> None:
    original = AwkwardError(3, detail="locked")
    original.lock = threading.Lock()  # type: ignore[attr-defined]
    error = through(original)
    assert isinstance(error, RemoteError)
    assert "`f` raised" in error.message and "3: locked" in error.message
    assert "_thread.lock" in error.hint
    assert error.remote_type.endswith("AwkwardError")
    assert "AwkwardError: 3: locked" in error.remote_traceback


def test_exception_whose_type_is_missing_here_becomes_a_remote_error() -> None:
    entries = pickle.loads(payload.pack_exception(ValueError("text"))[1:])
    entries[0]["value"] = payload.PLAIN + b"\x05cno_such_module\nError\n."
    entries[0]["type"] = "no_such_module.Error"
    error = payload.unpack_exception(payload.EXCEPTION + pickle.dumps(entries), "f")
    assert isinstance(error, RemoteError)
    assert "`no_such_module.Error`: text" in error.message


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_exception_that_would_end_the_caller_comes_back_as_a_remote_error(raised: BaseException) -> None:
    error = through(raised)
    assert isinstance(error, RemoteError)
    assert type(raised).__name__ in error.message


def test_hostile_exception_becomes_a_remote_error() -> None:
    error = through(HostileError())
    assert isinstance(error, RemoteError)
    assert "HostileError" in error.message


def test_exception_with_a_huge_message_is_cut() -> None:
    original = ValueError("x" * (payload.EXCEPTION_LIMIT_BYTES + 1))
    error = through(original)
    assert isinstance(error, RemoteError)
    assert len(error.message) < 2 * payload.TEXT_LIMIT


def test_endless_recursion_keeps_its_first_and_last_frames() -> None:
    def again(n: int) -> int:
        return again(n + 1)

    error = through(caught(lambda: again(0)))
    assert isinstance(error, RecursionError)
    assert len(traceback.extract_tb(error.__traceback__)) <= payload.FRAMES_LIMIT


@pytest.mark.parametrize("data", [b"", b"e", b"ejunk", b"e\x80\x05]\x94.", b"pwhat", b"e\x80\x05N."])
def test_damaged_exception_is_shown_as_one(data: bytes) -> None:
    assert isinstance(payload.unpack_exception(data, "f"), RemoteError)


def test_frames_with_absurd_positions_do_no_harm() -> None:
    entries = pickle.loads(payload.pack_exception(ValueError("v"))[1:])
    entries[0]["frames"] = [("/a.py", "f", 10**18, -5, 10**30, None, "text"), ("/b.py", "g", -1, 0, 0, 0, "")]
    error = payload.unpack_exception(payload.EXCEPTION + pickle.dumps(entries), "f")
    assert isinstance(error, ValueError)
    assert "in f" in printed(error)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="columns came with Python 3.11")
def test_traceback_marks_the_same_columns_as_the_original() -> None:
    def divide(a: int, b: int) -> float:
        return 1 + a / b

    original = caught(lambda: divide(1, 0))
    marks = [line for line in printed(original).splitlines() if set(line.strip()) & {"^"}]
    assert marks and marks[-1] in printed(through(original))


# ---- large values -------------------------------------------------------------------------------------------------


class Tagged(bytes):
    pass


@dataclasses.dataclass
class Holder:
    data: bytes


LARGE = bytes(range(256)) * 400


@pytest.mark.parametrize(
    "value",
    [
        LARGE,
        bytearray(LARGE),
        LARGE.decode("latin-1"),
        Tagged(LARGE),
        Holder(LARGE),
        [LARGE, LARGE, b"small"],
        {"a": LARGE, "b": (1, LARGE)},
        ([[LARGE]],),
        pickle.PickleBuffer(LARGE),
        [pickle.PickleBuffer(bytearray(LARGE)), LARGE],
    ],
    ids=lambda value: type(value).__name__,
)
def test_large_values_in_pieces_are_the_pickle_that_they_are_whole(value: Any) -> None:
    data = bytes(payload.pack_in_pieces(value, "it"))
    assert data == pickle.dumps(value, 5) == payload.pack(value, "it")
    same = payload.unpack(data, "it")
    assert type(same) is type(pickle.loads(pickle.dumps(value, 5)))
    assert same == pickle.loads(pickle.dumps(value, 5))


def test_large_bytes_are_sent_as_they_are_and_small_ones_in_one_piece() -> None:
    large = payload.pack_call_in_pieces((1, LARGE), {"key": [LARGE]}, "f")
    assert type(large) is Pieces
    assert sum(part is LARGE for part in large.parts) == 1  # the second is the first, to pickle
    assert payload.unpack_call(bytes(large), "f") == ((1, LARGE), {"key": [LARGE]})
    assert type(payload.pack_call_in_pieces((1, b"small"), {}, "f")) is bytes
    assert type(payload.pack_in_pieces(b"small", "it")) is bytes


def test_what_may_change_later_is_copied_when_it_is_packed() -> None:
    changing, view = bytearray(LARGE), bytearray(LARGE)
    packed = payload.pack_in_pieces([changing, pickle.PickleBuffer(view)], "it")
    changing[:] = view[:] = bytes(len(LARGE))
    assert payload.unpack(bytes(packed), "it") == [LARGE, LARGE]


def test_what_comes_out_of_a_reused_buffer_is_a_copy_that_is_writable_as_before() -> None:
    buffer = bytearray(payload.pack([LARGE, bytearray(LARGE)], "it"))
    fixed, changing = payload.unpack(memoryview(buffer).toreadonly(), "it")
    buffer[:] = bytes(len(buffer))
    assert (fixed, changing) == (LARGE, LARGE)
    assert type(fixed) is bytes
    changing[0] = 1


def test_a_numpy_array_travels_in_pieces_whatever_its_order() -> None:
    numpy = pytest.importorskip("numpy")
    for array in (
        numpy.arange(30_000.0).reshape(100, 300),
        numpy.asfortranarray(numpy.arange(30_000.0).reshape(100, 300)),
        numpy.arange(60_000.0)[::2],
        numpy.frombuffer(LARGE, dtype="u1"),
    ):
        packed = payload.pack_call_in_pieces((array,), {}, "f")
        assert type(packed) is Pieces
        before = array.copy()
        if array.flags.writeable:
            array[:] = 0
        ((same,), _) = payload.unpack_call(bytes(packed), "f")
        assert (same == before).all()
        assert same.flags.writeable == array.flags.writeable


def test_a_large_value_that_names_main_goes_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Holder, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Holder", Holder, raising=False)
    packed = payload.pack_in_pieces([Holder(b"small"), LARGE], "it")
    assert type(packed) is bytes
    assert packed[:1] == payload.BY_VALUE


def test_looking_for_large_members_runs_no_code_of_the_users() -> None:
    class Watched:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

        def __len__(self) -> int:
            raise AssertionError("len")

    assert not payload._is_large(Watched())
    assert not payload._is_large([Watched()])
