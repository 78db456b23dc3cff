"""A copy of everything that cannot be made again: the Store, the key that opens its secrets, and blobs.

The copy is laid out like a home, so that restoring is copying it to where a home shall be. It is taken from the files,
whether a server runs or not: first the database as of one moment, then the blobs, of which nothing that a row names can
be missing then, as blobs outlive the rows. A blob never changes, so on the same file system it is linked and takes no
room. A copy appears under its name when it is whole. Must never change anything of the home.
Tested in `tests/contract/test_backup.py`; for people in `docs/guide/operating.md`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from squall.config import Config
from squall.exception import ConflictError, Error, NotFoundError, ServiceError
from squall.server.schema import MARKER, RESTORE_HINT, Marker, check_file

KEY_FILE = "seal.key"
DUMP = "store.pgdump"
DUMP_S = 6 * 3600.0


@dataclass(frozen=True)
class Copied:
    """What a backup holds."""

    path: str
    database: str
    """`sqlite` or `postgresql`."""
    database_bytes: int
    blobs: int
    blob_bytes: int
    key: bool
    """Whether the key of the secrets is in it; otherwise it comes from a setting, and must be kept elsewhere."""


def back_up(config: Config, target: Path) -> Copied:
    """Make the backup `target`, a directory that does not exist yet.

    Raises NotFoundError where the home has no Store, ConflictError when `target` exists or the Store is damaged."""
    if target.exists():
        raise ConflictError(f"cannot back up to `{target}`: it exists", hint="give each backup a directory of its own")
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a backup that was interrupted
    try:
        for directory in (part, part / "state", part / "blobs"):
            directory.mkdir(parents=True, mode=0o700)
        kind, size = _copy_store(config, part / "state")
        key = _copy_key(config.state_dir, part / "state")
        blobs, blob_bytes = _copy_blobs(config.blobs_dir, part / "blobs")
        os.sync()  # thousands of files: one call is quicker than one for each
        part.rename(target)
    except OSError as error:
        raise ServiceError(
            f"cannot back up to `{target}`: {error}",
            hint="it needs to read the home, as the user of the server does, and room for a copy",
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Copied(str(target), kind, size, blobs, blob_bytes, key)


# ---- the Store ------------------------------------------------------------------------------------------------------


def _copy_store(config: Config, state: Path) -> tuple[str, int]:
    """Its kind and size."""
    marker = config.state_dir / MARKER
    if config.database_url:
        size = _dump_postgres(config.database_url, state / DUMP)
    else:
        size = _copy_sqlite(config.state_dir, state / "squall.db")
    if marker.exists():
        shutil.copy2(marker, state / MARKER)
    return ("postgresql" if config.database_url else "sqlite"), size


def _copy_sqlite(source: Path, target: Path) -> int:
    import sqlite3

    path = source / "squall.db"
    check_file(path, Marker(source))
    if not path.exists():
        raise NotFoundError(
            f"there is nothing to back up: no Store at `{path}`", hint="which home is meant? SQUALL_HOME"
        )
    target.touch(mode=0o600)
    try:
        with (
            contextlib.closing(sqlite3.connect(path, timeout=30.0)) as from_,
            contextlib.closing(sqlite3.connect(target)) as to,
        ):
            from_.backup(to)  # at once, as of one moment: in parts it would begin anew with every commit meanwhile
            found = to.execute("PRAGMA quick_check(3)").fetchall()
    except sqlite3.DatabaseError as error:
        raise ConflictError(f"cannot copy `{path}`: {error}", hint=RESTORE_HINT) from error
    if found != [("ok",)]:
        raise ConflictError(f"cannot copy `{path}`, it is damaged: {found}"[:500], hint=RESTORE_HINT)
    return target.stat().st_size


def _dump_postgres(url: str, target: Path) -> int:
    program = shutil.which("pg_dump")
    if program is None:
        raise ServiceError(
            "cannot copy the database: `pg_dump` is not installed",
            hint="apt-get install postgresql-client, in the version of the server or newer",
        )
    plain, password = split_password(url)
    environ = {**os.environ, **({"PGPASSWORD": password} if password else {})}
    command = [program, "--format=custom", "--no-owner", f"--file={target}", f"--dbname={plain}"]
    run = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=DUMP_S, check=False, stdin=subprocess.DEVNULL
    )
    if run.returncode:
        raise Error(
            f"`pg_dump` failed: {run.stderr.strip()[-500:]}",
            hint="its version must be that of the server or newer; is the server there?",
        )
    target.chmod(0o600)
    return target.stat().st_size


def split_password(url: str) -> tuple[str, str]:
    """A URL of PostgreSQL without its password, which others could see among the arguments, and the password."""
    parts = urlsplit(url)
    user = quote(unquote(parts.username or ""), safe="")
    _, at, host = parts.netloc.rpartition("@")
    plain = urlunsplit(parts._replace(netloc=f"{user}{at}{host}"))
    # What is meant for SQLAlchemy's driver is nothing to libpq.
    return plain.replace("postgresql+psycopg:", "postgresql:", 1), unquote(parts.password or "")


# ---- the rest -------------------------------------------------------------------------------------------------------


def _copy_key(source: Path, target: Path) -> bool:
    try:
        shutil.copy2(source / KEY_FILE, target / KEY_FILE)
    except FileNotFoundError:
        return False
    return True


def _copy_blobs(source: Path, target: Path) -> tuple[int, int]:
    """How many, and their bytes."""
    count = size = 0
    for path in _blobs(source):
        place = target / path.parent.name
        place.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # too old: the server has just removed it
            _link(path, place / path.name)
            count += 1
            size += (place / path.name).stat().st_size
    return count, size


def _blobs(source: Path) -> Iterator[Path]:
    return source.glob("[0-9a-f][0-9a-f]/*")


def _link(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copy2(path, copy)
