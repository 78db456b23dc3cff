"""What two versions differ in, and that a definition comes back from the Store as it was."""

from __future__ import annotations

from squall.protocol.messages import FunctionSpec, ImageSpec, ImageStep, RetryPolicy, ScheduleSpec
from squall.server.versions import blobs_of, changes_between, images_of, pack_specs, unpack_specs


def spec(tag: str, **fields: object) -> FunctionSpec:
    return FunctionSpec(tag, **{"module": "m", "qualname": tag, "source": "a" * 64, **fields})  # type: ignore[arg-type]


def test_changes_name_functions_and_the_options_that_are_others() -> None:
    before = [spec("f"), spec("g", cpu=1.0), spec("h")]
    after = [spec("g", cpu=2.0, source="b" * 64), spec("h"), spec("i")]
    assert changes_between(before, after) == {"added": ["i"], "removed": ["f"], "changed": {"g": ["cpu", "source"]}}


def test_equal_versions_have_no_changes() -> None:
    assert changes_between([spec("f")], [spec("f")]) == {"added": [], "removed": [], "changed": {}}


def test_code_sent_by_value_counts_as_source() -> None:
    changed = changes_between([spec("f", serialized_blob="a")], [spec("f", serialized_blob="b")])["changed"]
    assert changed == {"f": ["source"]}


def test_a_definition_comes_back_as_it_was() -> None:
    image = ImageSpec("layers", [ImageStep("pip", {"packages": ["x"]}, "c" * 64)])
    specs = [
        spec("f", env={"A": "1"}, retries=RetryPolicy(3), image=image, gpu=["H100"]),
        spec("g", schedules=[ScheduleSpec(cron="* * * * *")], shape={"methods": {"run": False}, "parameters": []}),
    ]
    assert unpack_specs(pack_specs(specs)) == specs


def test_what_a_version_needs_is_found() -> None:
    image = ImageSpec("layers", [ImageStep("files", {}, "c" * 64)])
    specs = [spec("f", image=image), spec("g", source="", serialized_blob="d" * 64)]
    assert blobs_of(specs) == {"a" * 64, "c" * 64, "d" * 64}
    assert len(images_of(specs)) == 1
