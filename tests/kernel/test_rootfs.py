"""Roots: what `Image.host()` shows of a machine, and that a hostile tree can be deleted and nothing beside it."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from pathlib import Path

import pytest

from squall.node import linux, privileges, removal, rootfs


def test_paths_below_another_are_shown_once() -> None:
    assert rootfs._collapse(["/usr/lib/python3", "/opt", "/usr", "/usrlocal"]) == ("/opt", "/usr", "/usrlocal")


def test_import_paths_leave_out_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    library = tmp_path / "library"
    library.mkdir()
    shown, _ = rootfs.import_paths(tmp_path / "home", ["", str(library), str(library), "/does/not/exist"])
    assert shown == [str(library)]
    shown, _ = rootfs.import_paths(tmp_path / "home", [str(tmp_path), str(library)])
    assert shown == [str(library)]


def test_import_path_that_would_show_too_much_is_skipped_and_named(tmp_path: Path) -> None:
    home = tmp_path / "data" / "squall"
    home.mkdir(parents=True)
    shown, skipped = rootfs.import_paths(home, ["/nowhere", "/", "/tmp", str(tmp_path / "data")])
    assert (shown, skipped) == ([], ["/", "/tmp", str(tmp_path / "data")])


def test_host_root_shows_the_interpreter_and_what_it_imports(tmp_path: Path) -> None:
    root = rootfs.host_root(tmp_path / "node")
    needed = [sys.prefix, sys.base_prefix, os.path.realpath(sys.executable), rootfs.__file__]
    assert all(rootfs._is_below(os.path.realpath(path), map(os.path.realpath, root.binds)) for path in needed)
    assert all((root.skeleton / path[1:]).exists() for path in root.binds)
    assert (root.skeleton / "tmp").stat().st_mode & 0o7777 == 0o1777


def test_same_host_gives_the_same_root(tmp_path: Path) -> None:
    first, second = rootfs.host_root(tmp_path / "node"), rootfs.host_root(tmp_path / "node")
    assert first == second
    assert [path.name for path in (tmp_path / "node" / "layers").iterdir()] == [f"host-{first.key}"]


def test_removing_follows_no_link(tmp_path: Path) -> None:
    keep, tree = tmp_path / "keep", tmp_path / "tree"
    keep.mkdir()
    (keep / "file").write_text("precious")
    (tree / "inner" / "more").mkdir(parents=True)
    (tree / "link").symlink_to(keep)
    (tree / "inner" / "link").symlink_to(keep)
    (tree / "inner" / "more" / "file").write_text("x")
    rootfs.remove_tree(tree)
    assert not tree.exists()
    assert (keep / "file").read_text() == "precious"


def test_removing_a_tree_that_became_a_link_removes_the_link(tmp_path: Path) -> None:
    (tmp_path / "keep").mkdir()
    (tmp_path / "tree").symlink_to(tmp_path / "keep")
    rootfs.remove_tree(tmp_path / "tree")
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]


def test_removing_what_is_gone_is_harmless(tmp_path: Path) -> None:
    rootfs.remove_tree(tmp_path / "nothing")


def test_removing_a_very_deep_tree_needs_neither_stack_nor_descriptors(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    fd = os.open(tree, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("deeper", dir_fd=fd)
        inner = os.open("deeper", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)
    rootfs.remove_tree(tree)
    assert not tree.exists()


def test_removing_ends_at_its_deadline_and_can_be_taken_up_again(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for number in range(20):
        (tree / f"d{number}" / "inner").mkdir(parents=True)
    with pytest.raises(TimeoutError, match="more than could be deleted"):
        rootfs.remove_tree(tree, deadline=0.0)
    rootfs.remove_tree(tree)
    assert not tree.exists()


def test_nobody_waits_long_for_very_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, removed = threading.Event(), []

    def slow(path: Path, deadline: float) -> None:
        go_on.wait(10)
        removed.append(path)

    async def main() -> None:
        removals = removal.Removals()
        await asyncio.gather(*(removals.remove(tmp_path / str(number)) for number in range(3)))
        assert removed == []
        go_on.set()
        await removals.close()

    monkeypatch.setattr(removal, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(removal, "remove_tree", slow)
    asyncio.run(main())
    assert len(removed) == 3


def test_removal_that_fails_is_logged_and_no_more(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(path: Path, deadline: float) -> None:
        raise TimeoutError(110, "too much")

    async def main() -> None:
        removals = removal.Removals()
        await removals.remove(tmp_path)
        await removals.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(removal, "remove_tree", fail)
        asyncio.run(main())
    assert "left until the next start" in capfd.readouterr().err


def test_removing_survives_names_that_are_in_the_way(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in (".1/x/y", ".2/x/y", "a/b/c/d", "a/.1/c"):
        (tree / name).mkdir(parents=True)
    (tree / ".3").write_text("a file")
    rootfs.remove_tree(tree)
    assert not tree.exists()


@pytest.mark.root
def test_tree_is_mounted_read_only_with_the_workspaces_ids_and_unmounted_whole(tmp_path: Path) -> None:
    linux.enter_private_mounts()
    root = rootfs.host_root(tmp_path / "node")
    base = privileges.id_base(7)
    userns = linux.make_user_namespace(base)
    target, devices, scratch = tmp_path / "tree", tmp_path / "dev", tmp_path / "scratch"
    scratch.mkdir()
    rootfs.make_device_template(devices)
    rootfs.mount_tree(root, target, userns=userns, scratch=scratch, devices=devices)
    try:
        assert (target / "root").stat().st_uid == base, "the skeleton is the workspace's"
        assert (target / "etc" / "passwd").stat().st_uid == 0, "the host's files are not"
        assert Path(target / "dev" / "null").is_char_device()
        for place in ("", "usr", "etc", "dev", ".squall/lower"):
            with pytest.raises(OSError, match="Read-only file system"):
                (target / place / "new").touch()
        with pytest.raises(OSError, match="Value too large"):  # root of the machine has no id in the workspace's mount
            (target / ".squall" / "scratch" / "file").touch()
    finally:
        rootfs.unmount(target)
        rootfs.unmount(devices)
        os.close(userns)
    assert f" {target}" not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.parametrize("link", [".squall", ".squall/lower", ".squall/lib", "wheels", "proc", "dev"])
def test_links_in_the_layers_of_an_image_lead_no_mount_out_of_it(tmp_path: Path, link: str) -> None:
    linux.enter_private_mounts()
    outside = tmp_path / "outside"
    for name in ("lower", "scratch", "lib/squall", "squall", "index"):
        (outside / name).mkdir(parents=True)
    layer = tmp_path / "layer"
    (layer / link).parent.mkdir(parents=True, exist_ok=True)
    (layer / link).symlink_to(outside)
    shown = tmp_path / "shown"
    shown.mkdir()
    places = [(str(shown), "/.squall/lib/squall"), (str(shown), "/wheels/index")]
    root = rootfs.image_root(tmp_path / "node", [layer], places, {})
    userns = linux.make_user_namespace(privileges.id_base(7))
    target, devices, scratch = tmp_path / "tree", tmp_path / "dev", tmp_path / "scratch"
    scratch.mkdir()
    rootfs.make_device_template(devices)
    try:
        with pytest.raises(linux.StepError, match="mount-tree"):
            rootfs.mount_tree(root, target, userns=userns, scratch=scratch, devices=devices)
        assert f" {outside}" not in Path("/proc/self/mountinfo").read_text()
    finally:
        rootfs.unmount_tree(target)
        rootfs.unmount(devices)
        os.close(userns)
