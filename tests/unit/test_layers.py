"""The store of layers: whole or absent, checked, and never taken from under anybody."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from squall.exception import NotFoundError
from squall.node.layers import Layer, Layers
from squall.protocol.images import layer_keys
from squall.protocol.messages import ImageSpec, ImageStep

IMAGE = ImageSpec("layers", [ImageStep("debian", {"suite": "bookworm"}), ImageStep("run", {"commands": ["true"]})])


@pytest.fixture
def store(tmp_path: Path) -> Layers:
    layers = Layers(tmp_path / "layers")
    layers.root.mkdir()
    return layers


def add(store: Layers, key: str = "k", text: str = "hello") -> Layer:
    building = store.begin()
    (building / "tree/deep/er").mkdir(parents=True)
    (building / "tree/deep/er/file").write_text(text)
    (building / "tree/link").symlink_to("/etc/passwd")
    return store.publish(building, Layer(key, "a step", building))


def reopened(store: Layers) -> Layers:
    again = Layers(store.root)
    again.open()
    return again


def test_published_layer_is_found_by_its_key(store: Layers) -> None:
    assert store.find("k") is None
    layer = add(store)
    assert store.find("k") is layer
    assert (layer.tree / "deep/er/file").read_text() == "hello"


def test_image_is_its_layers_topmost_first(store: Layers) -> None:
    layers = [add(store, key) for key, _ in layer_keys(IMAGE)]
    assert store.has(IMAGE)
    assert store.resolve(IMAGE) == tuple(reversed(layers))


def test_image_that_lacks_a_layer_says_so(store: Layers) -> None:
    assert not store.has(IMAGE)
    with pytest.raises(NotFoundError, match="lacks its layer"):
        store.resolve(IMAGE)


def test_half_made_layer_is_gone_after_a_restart(store: Layers) -> None:
    building = store.begin()
    (building / "tree").mkdir()
    assert reopened(store).all() == []
    assert not building.exists()


def test_settled_layer_outlives_a_restart(store: Layers) -> None:
    store.settle(add(store))
    found = reopened(store).find("k")
    assert found is not None
    assert (found.files, found.size_bytes, found.settled) == (4, 5 + len("/etc/passwd"), True)


def test_layer_of_this_boot_counts_before_it_is_written_out(store: Layers) -> None:
    add(store)
    assert reopened(store).find("k") is not None


def test_layer_that_a_power_cut_may_have_taken_bytes_of_is_absent(store: Layers) -> None:
    layer = add(store)
    meta = json.loads((layer.path / "meta.json").read_text())
    (layer.path / "meta.json").write_text(json.dumps({**meta, "boot": "another"}))
    assert reopened(store).find("k") is None
    assert not layer.path.exists()


@pytest.mark.parametrize("content", ["", "{", '{"key": "k", "what": 1}', "[]"])
def test_layer_whose_description_is_cut_off_is_absent(store: Layers, content: str) -> None:
    layer = add(store)
    (layer.path / "meta.json").write_text(content)
    assert reopened(store).find("k") is None


def test_building_a_step_again_makes_another_and_the_newer_counts(store: Layers) -> None:
    first, second = add(store, text="one"), add(store, text="two")
    assert store.find("k") is second
    assert (first.tree / "deep/er/file").read_text() == "one"
    assert {layer.path for layer in reopened(store).all()} == {first.path, second.path}


# ---- checking


def test_layer_as_it_was_built_passes_both_checks(store: Layers) -> None:
    layer = add(store)
    store.settle(layer)
    assert store.check(layer) == store.check(layer, deep=True) == ""


def truncate(tree: Path) -> None:
    (tree / "deep/er/file").write_text("")


def remove(tree: Path) -> None:
    (tree / "link").unlink()


def extend(tree: Path) -> None:
    (tree / "new").touch()


def change_mode(tree: Path) -> None:
    (tree / "deep/er/file").chmod(0o4755)


@pytest.mark.parametrize(
    ("damage", "said"),
    [(truncate, "another size"), (remove, "missing"), (extend, "added"), (change_mode, "another size or mode")],
)
def test_damage_is_named(store: Layers, damage: object, said: str) -> None:
    layer = add(store)
    store.settle(layer)
    assert callable(damage)
    damage(layer.tree)
    assert said in store.check(layer)


def test_flipped_bit_is_found_by_the_deep_check(store: Layers) -> None:
    layer = add(store)
    store.settle(layer)
    (layer.tree / "deep/er/file").write_text("hellp")
    assert store.check(layer) == ""
    assert "other bytes" in store.check(layer, deep=True)


def test_flipped_bit_in_the_index_is_found(store: Layers) -> None:
    layer = add(store)
    store.settle(layer)
    (layer.path / "index").write_bytes(b" " + (layer.path / "index").read_bytes())
    assert "index has changed" in store.check(layer)


def test_damaged_layer_is_out_at_once_and_may_be_built_again(store: Layers) -> None:
    store.quarantine(add(store), "a test")
    assert store.find("k") is None
    assert add(store).path.exists()


# ---- removing


def test_prune_removes_what_nobody_keeps_or_holds(store: Layers) -> None:
    kept, held, gone = add(store, "kept"), add(store, "held"), add(store, "gone")
    store.hold([held])
    assert store.prune({"kept"}) == [gone]
    store.remove_doomed()
    assert sorted(os.listdir(store.root)) == sorted([kept.path.name, held.path.name])
    store.release([held])
    assert store.prune({"kept"}) == [held]


def test_layer_that_was_replaced_is_pruned_though_its_key_is_kept(store: Layers) -> None:
    old, new = add(store), add(store)
    assert store.prune({"k"}) == [old]
    assert store.find("k") is new


def test_layer_held_twice_is_released_twice(store: Layers) -> None:
    layer = add(store)
    store.hold([layer])
    store.hold([layer])
    store.release([layer])
    assert store.prune(set()) == []
    store.release([layer])
    assert store.prune(set()) == [layer]


def test_layers_take_turns_at_being_verified(store: Layers) -> None:
    assert store.least_verified() is None
    layers = [add(store, key) for key in "abc"]
    assert store.least_verified() is None
    for layer in layers:
        store.settle(layer)
    seen = []
    for _ in range(6):
        found = store.least_verified()
        assert found is not None
        seen.append(found.key)
        store.verified(found)
    assert seen == [*"abc", *"abc"]


# ---- removing while others begin to use


def test_layers_are_never_taken_from_under_who_holds_them(store: Layers) -> None:
    """Holders come and go between any two steps of a collector, in an order of chance."""
    rng = random.Random(11)
    held: list[Layer] = []
    for round_ in range(400):
        key = str(rng.randrange(5))
        found = store.find(key)
        layer = add(store, key) if found is None else found
        action = rng.random()
        if action < 0.5:
            store.hold([layer])
            held.append(layer)
        elif action < 0.6:
            add(store, key, text=str(round_))
        elif action < 0.8 and held:
            store.release([held.pop(rng.randrange(len(held)))])
        else:
            store.prune({str(rng.randrange(5))})
            store.remove_doomed()
        assert all((layer.tree / "deep/er/file").exists() for layer in held)
    for layer in held:
        store.release([layer])
    store.prune(set())
    store.remove_doomed()
    assert os.listdir(store.root) == []
