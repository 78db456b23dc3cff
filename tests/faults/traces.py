"""What a Squall that has ended may not leave behind, beyond what `leftovers` of every test finds."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import leftovers


def traces_of(home: Path) -> list[str]:
    """In words; nothing when all is gone."""
    return [*leftovers(home), *_scratch(home), *_namespaces(home)]


def _scratch(home: Path) -> list[str]:
    """Files of containers, of builds and of uploads that nobody will end."""
    found = [path for name in ("scratch", "mounts", "leftover") for path in (home / "node" / name).glob("*/*")]
    found += list((home / "blobs" / "incoming").glob("*"))
    return [f"file {path}" for path in found]


def _namespaces(home: Path) -> list[str]:
    """Mount namespaces, and so their processes, that see something of this home."""
    found = []
    mark = str(home / "node").encode()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "mountinfo").read_bytes():
                found.append(f"namespace of process {entry.name}: {(entry / 'comm').read_text().strip()}")
        except OSError:  # it has ended
            continue
    return found
