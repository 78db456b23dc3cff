"""In which order inputs wait, and how many leave at once; under any mix of moves that hypothesis can think of."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from squall.server import lines
from squall.server.inputs import Call, Function, FunctionOptions, Input, Run

BIG = 5000


def function_of(name: str = "fu-1") -> Function:
    return Function(name, FunctionOptions(), 0.0)


def add(call: Call, *idxs: int) -> list[Input]:
    """Inputs that are new to their call, at the end of the queue."""
    made = []
    for idx in idxs:
        input_ = call.inputs[idx] = Input(call, idx, None, 0.0)
        lines.enter(input_)
        made.append(input_)
    return made


def order(function: Function) -> list[tuple[str, int]]:
    return [(one.call_id, one.idx) for one in lines.waiting(function.queue)]


def test_inputs_of_one_spawned_call_are_one_entry_of_the_queue() -> None:
    function = function_of()
    call = Call("fc-1", function, "spawn", None)
    add(call, *range(BIG))
    assert len(function.queue) == 2, "the first alone, as there was no second yet, and a run"
    assert function.queued == BIG and order(function) == [("fc-1", idx) for idx in range(BIG)]


def test_single_spawned_inputs_and_maps_are_entries_themselves() -> None:
    function = function_of()
    for number in range(3):
        add(Call(f"fc-{number}", function, "spawn", None), 0)
    add(Call("fc-map", function, "map", None), *range(5))
    assert not any(isinstance(entry, Run) for entry in function.queue) and len(function.queue) == 8


def test_calls_that_come_in_turn_are_taken_in_turn() -> None:
    function = function_of()
    first, second = Call("fc-1", function, "spawn", None), Call("fc-2", function, "spawn", None)
    for idx in range(0, 12, 3):
        add(first, idx, idx + 1, idx + 2)
        add(second, idx, idx + 1)
    expected = order(function)
    taken = [(one.call_id, one.idx) for _ in range(7) for one in lines.take(function, 3)]
    assert taken == expected and function.queued == 0 and not function.queue


def test_what_is_dropped_leaves_and_what_others_wait_for_stays() -> None:
    function = function_of()
    call, other = Call("fc-1", function, "spawn", None), Call("fc-2", function, "spawn", None)
    inputs = add(call, *range(BIG))
    add(other, 0, 1, 2)
    running = lines.take(function, 2)
    for one in running:
        one.state = "running"
    before, runs = lines.drop(call)
    assert list(call.inputs.values()) == running == inputs[:2]
    assert len(before) == BIG and sum(len(run) for run in runs) == BIG - 2
    assert function.queued == 3 and order(function) == [("fc-2", 0), ("fc-2", 1), ("fc-2", 2)]
    assert [one.idx for one in lines.take(function, 9)] == [0, 1, 2]


def test_an_input_in_the_middle_of_a_run_can_be_removed() -> None:
    function = function_of()
    call = Call("fc-1", function, "spawn", None)
    inputs = add(call, *range(6))
    for one in (inputs[3], inputs[0]):
        lines.remove(one)
        function.queued -= 1
    assert call.line is not None and set(call.line.outside) == {0, 3}
    assert [one.idx for one in lines.take(function, 9)] == [1, 2, 4, 5]


def test_a_run_gives_back_the_room_of_what_has_left_it() -> None:
    function = function_of()
    call = Call("fc-1", function, "spawn", None)
    add(call, *range(BIG))
    lines.take(function, BIG - 10)
    run = function.queue[0]
    assert isinstance(run, Run) and len(run.inputs) - run.at == 10 and len(run.inputs) <= lines.SHED_ABOVE + 20


def test_something_ahead_is_found_in_queues_of_either_kind() -> None:
    function = function_of()
    assert lines.probe(function, 500) is None
    singles = [add(Call(f"fc-{number}", function, "spawn", None), 0)[0] for number in range(100)]
    assert lines.probe(function, 40) is singles[20]
    lines.take(function, 100)
    inputs = add(Call("fc-m", function, "spawn", None), *range(100))
    lines.take(function, 1)
    assert lines.probe(function, 40) is inputs[21]


def test_what_comes_after_a_call_was_dropped_can_be_dropped_as_well() -> None:
    function = function_of()
    call = Call("fc-1", function, "spawn", None)
    for first in (0, 10):
        add(call, *range(first, first + 4))
        lines.drop(call)
        assert function.queued == len(list(lines.waiting(function.queue)))


MOVES = st.lists(
    st.tuples(st.sampled_from(("add", "back", "take", "cancel", "drop", "move")), st.integers(0, 2), st.integers(1, 4)),
    max_size=40,
)


@given(moves=MOVES)
def test_queue_keeps_its_order_whatever_comes_and_goes(moves: list[tuple[str, int, int]]) -> None:
    """Beside a list that holds the same."""
    function = function_of()
    calls = [Call(f"fc-{number}", function, kind, None) for number, kind in enumerate(("spawn", "spawn", "map"))]
    plain: list[Input] = []
    taken: list[Input] = []
    for number, (move, which, count) in enumerate(moves):
        call = calls[which]
        if move == "add":
            plain += add(call, *range(number * 10, number * 10 + count))
        elif move == "back" and taken:
            one = taken.pop()
            one.state = "queued"
            lines.enter(one, first=bool(count % 2))
            plain.insert(0 if count % 2 else len(plain), one)
        elif move == "take":
            for one in lines.take(function, count):
                assert one is plain.pop(0)
                one.state = "running"
                taken.append(one)
        elif move == "cancel" and plain:
            one = plain.pop(count % len(plain))
            one.state = "done"
            one.call.function.queued -= 1
            del one.call.inputs[one.idx]
            if one.call.line is not None:
                one.call.line.outside.pop(one.idx, None)
        elif move == "drop" and call.line is not None:
            lines.drop(call)
            plain = [one for one in plain if one.call is not call or call.inputs.get(one.idx) is one]
        elif move == "move":
            successor = function_of(f"fu-{number}")
            lines.move(function, successor)
            for other in calls:
                assert other.function is successor or not any(one.call is other for one in plain)
                other.function = successor
            function = successor
        assert list(lines.waiting(function.queue)) == plain
        assert function.queued == len(plain)
