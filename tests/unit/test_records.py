"""Records are dataclasses to whoever looks, and cost nothing before that."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
import threading
from typing import Any, ClassVar

import msgspec
import pytest

from squall.protocol import messages, requests, resumption  # noqa: F401  (their messages enter the table)
from squall.protocol.records import MISSING, Record, defaults_of, field, record, replaced


def fresh() -> Any:
    """A class that nobody has looked at."""

    @record
    class Parcel(Record):
        KIND: ClassVar[str] = "parcel"
        weight: float
        labels: list[str] = field(default_factory=list)
        sender: str = "nobody"
        id: int = field(default=7, kw_only=True)

    return Parcel


def test_a_record_is_filled_from_its_annotations() -> None:
    parcel = fresh()
    one, other = parcel(2.5), parcel(2.5, ["fragile"], id=3)
    one.labels.append("heavy")
    assert (one.weight, one.labels, one.sender, one.id) == (2.5, ["heavy"], "nobody", 7)
    assert (other.labels, other.id, other.KIND) == (["fragile"], 3, "parcel")
    assert repr(other) == "Parcel(weight=2.5, labels=['fragile'], sender='nobody', id=3)"


def test_a_record_becomes_a_dataclass_when_somebody_looks() -> None:
    parcel = fresh()
    before = parcel(1.0)
    assert [one.name for one in dataclasses.fields(parcel)] == ["weight", "labels", "sender", "id"]
    after = parcel(1.0)
    after.labels.append("late")
    assert before == parcel(1.0) and dataclasses.asdict(after) == {**dataclasses.asdict(before), "labels": ["late"]}
    assert dataclasses.replace(before, sender="me").sender == "me"


def test_looking_does_not_change_how_a_record_is_made() -> None:
    looked_at, other = fresh(), fresh()
    dataclasses.fields(looked_at)
    assert (
        defaults_of(looked_at) == defaults_of(other) == {"weight": MISSING, "labels": [], "sender": "nobody", "id": 7}
    )
    for parcel in (looked_at, other):
        with pytest.raises(TypeError):
            parcel(1.0, [], "me", 9)  # `id` has no place


def test_a_class_below_a_record_that_was_looked_at_has_all_its_fields() -> None:
    parcel = fresh()
    dataclasses.fields(parcel)

    @record
    class Letter(parcel):  # type: ignore[misc,valid-type]
        stamp: str = "blue"

    assert list(defaults_of(Letter)) == ["weight", "labels", "sender", "id", "stamp"]
    assert Letter(0.02, [], "me", "red").stamp == "red"
    assert [one.name for one in dataclasses.fields(Letter)] == ["weight", "labels", "sender", "id", "stamp"]


def test_a_class_made_of_a_record_without_being_marked_is_one_of_its_kind() -> None:
    class Special(fresh()):  # type: ignore[misc]
        colour: str = "red"

    assert "colour" not in defaults_of(Special)
    assert Special(1.0) == Special(1.0)


def test_threads_that_look_at_the_same_time_see_the_same_dataclass() -> None:
    parcel = fresh()
    barrier, seen = threading.Barrier(8), []

    def look() -> None:
        barrier.wait(10)
        seen.append([one.name for one in dataclasses.fields(parcel)])

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert seen == [["weight", "labels", "sender", "id"]] * 8


def test_a_copy_with_other_values_leaves_the_first_alone() -> None:
    policy = messages.RetryPolicy(2)
    assert replaced(policy, max_delay=5.0) == messages.RetryPolicy(2, max_delay=5.0)
    assert policy.max_delay == 60.0


def test_a_record_is_pickled_and_decoded_as_any_other_class() -> None:
    spec = messages.FunctionSpec("f", env={"A": "b"}, retries=messages.RetryPolicy(1))
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert msgspec.json.decode(msgspec.json.encode(spec), type=messages.FunctionSpec) == spec


@pytest.mark.parametrize("tag", sorted(messages.MESSAGES))
def test_every_message_has_the_same_fields_before_and_after_somebody_looks(tag: str) -> None:
    cls = messages.MESSAGES[tag]
    known = {
        one.name: one.default_factory() if one.default_factory is not dataclasses.MISSING else one.default
        for one in dataclasses.fields(cls)
    }
    assert defaults_of(cls) == {k: MISSING if v is dataclasses.MISSING else v for k, v in known.items()}


def test_specs_are_made_and_encoded_without_dataclasses() -> None:
    program = (
        "import sys\nfrom squall.protocol.specs import FunctionSpec, ImageSpec, ImageStep\n"
        "spec = FunctionSpec('f', image=ImageSpec('layers', [ImageStep('run', {'commands': ['a']})]))\n"
        "assert spec == FunctionSpec('f', image=ImageSpec('layers', [ImageStep('run', {'commands': ['a']})]))\n"
        "assert 'tag=' in repr(spec) and 'dataclasses' not in sys.modules, 'dataclasses were loaded'\n"
        "from squall.protocol.messages import build, to_dict\n"
        "assert build(FunctionSpec, {'tag': 'f'}) == FunctionSpec('f') and to_dict(spec)['tag'] == 'f'\n"
        "assert type(vars(FunctionSpec)['__dataclass_fields__']) is not dict, 'it became a dataclass'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
