"""Which images go when layers take more than they may."""

from __future__ import annotations

from squall.server.builds import Kept, choose_gone

SIZES = {"base": 100, "a": 10, "b": 20, "c": 30}


def image(name: str, used_at: float, *keys: str) -> Kept:
    return Kept(name, used_at, frozenset(keys))


OLD, MIDDLE, NEW = image("old", 1, "base", "a"), image("middle", 2, "base", "b"), image("new", 3, "base", "c")


def gone(*images: Kept, quota: int, used: set[str] = frozenset(), sizes: dict[str, int] = SIZES) -> list[str]:  # type: ignore[assignment]
    return choose_gone(images, sizes, set(used), quota)[0]


def test_none_goes_while_layers_fit() -> None:
    assert choose_gone([OLD, MIDDLE, NEW], SIZES, set(), 160) == ([], False)


def test_images_used_longest_ago_go_until_the_rest_fits() -> None:
    assert gone(NEW, MIDDLE, OLD, quota=150) == ["old"]
    assert gone(NEW, MIDDLE, OLD, quota=149) == ["old", "middle"]


def test_image_in_use_stays_whatever_its_age() -> None:
    assert gone(OLD, MIDDLE, NEW, quota=149, used={"old"}) == ["middle"]
    assert gone(OLD, MIDDLE, NEW, quota=0, used={"old", "middle", "new"}) == []


def test_shared_layer_goes_with_the_last_image_that_has_it() -> None:
    assert gone(OLD, MIDDLE, NEW, quota=30) == ["old", "middle", "new"]


def test_image_that_is_the_beginning_of_one_in_use_stays_as_it_would_free_nothing() -> None:
    beginning = image("beginning", 0, "base")
    assert gone(beginning, OLD, NEW, quota=135, used={"old"}, sizes={"base": 100, "a": 10, "c": 30}) == ["new"]


def test_layers_of_no_image_go_first() -> None:
    assert choose_gone([OLD], {"base": 100, "a": 10, "lost": 50}, set(), 110) == ([], True)
