"""`squall backup`: a copy of what cannot be made again, whether a server runs or not.

What it copies is tested in `tests/contract/test_backup.py`, the command in `tests/integration/test_store.py`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from squall import config
from squall.cli.documents import json_option, print_json


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@json_option
def backup(directory: Path, as_json: bool) -> None:
    """Copy the Store, the key of its secrets and blobs to DIRECTORY, which must not exist yet.

    A server may run meanwhile. The copy is laid out like a home: restoring is copying it to where a home shall be.
    Whoever reads the copy reads the secrets; it is made for its owner only."""
    from squall.server.backup import back_up

    copied = back_up(config.load(), directory.absolute())
    if as_json:
        print_json(asdict(copied))
        return
    click.echo(f"store  {copied.database}, {copied.database_bytes / (1 << 20):.1f} MiB")
    click.echo(f"blobs  {copied.blobs}, {copied.blob_bytes / (1 << 20):.1f} MiB")
    click.echo(f"key    {'copied' if copied.key else 'none in the home'}")
    click.echo(f"backup in {copied.path}", err=True)
