"""`squall up`: a server that stays, for this machine's programs and, where it listens, for others.

In the foreground this process becomes the server, so that a terminal, a container or systemd has the very process it
started. `--detach` leaves it running and waits until it serves. Must never end a server that has work: an idle embedded
one makes way. Tested in `tests/unit/test_cli_access.py` and `tests/acceptance/test_server.py`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import click

from squall import client as clients
from squall import config
from squall.cli.admin import here, wait_gone
from squall.cli.documents import json_option, print_json, tell
from squall.cli.manage import ask
from squall.exception import ConflictError, InvalidError, ServiceError
from squall.protocol.requests import GetServer, ListObjects, StopServer

LOOK_S = 0.05
STOP_SECONDS = 90
"""What ending takes at most after inputs were drained: exit hooks of classes, then their containers."""


@click.command()
@click.option("--listen", metavar="HOST:PORT", default="", help="Take clients from elsewhere there, with a token.")
@click.option("--tls-cert", metavar="FILE", default="", help="Certificate chain in PEM, for TLS at that address.")
@click.option("--tls-key", metavar="FILE", default="", help="Private key of that certificate, in PEM.")
@click.option("-d", "--detach", is_flag=True, help="Leave it running and return once it serves.")
@click.option("--systemd", is_flag=True, help="Start nothing; print a unit file that does.")
@json_option
def up(listen: str, tls_cert: str, tls_key: str, detach: bool, systemd: bool, as_json: bool) -> None:
    """Start a server that stays, until `squall down`, Ctrl-C or SIGTERM.

    Without --listen, or the setting `listen`, only programs of this machine and user reach it.
    """
    config.choose(listen=listen, tls_cert=_absolute(tls_cert), tls_key=_absolute(tls_key))
    settings = config.load()
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise InvalidError("TLS needs a certificate and its key", hint="give both --tls-cert and --tls-key")
    if systemd:
        if as_json:
            print_json({"home": str(settings.home), "unit": unit(settings)})
        else:
            click.echo(unit(settings), nl=False)
        return
    _make_way(settings)
    if detach:
        _detach(settings, as_json)
    else:
        _become_server(settings, as_json)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve()) if path else ""


def _make_way(settings: config.Config) -> None:
    """End an embedded server that has nothing to do; refuse where one stays or works."""
    client = here(settings)
    if client is None:
        return
    facts = ask(client.link, GetServer())
    rows = ask(client.link, ListObjects("apps")).get("rows", [])
    apps = [row for row in rows if row.get("state") == "running" and not row.get("deployed")]  # deployed ones go on
    if facts["stays"] or apps:
        what = "runs already" if facts["stays"] else f"runs {len(apps)} app(s) of programs that are not done"
        raise ConflictError(f"a server of `{settings.home}` {what}, pid {facts['pid']}", hint="`squall down` ends it")
    ask(client.link, StopServer("`squall up` takes its place"))
    wait_gone(client, settings, STOP_SECONDS)


def _become_server(settings: config.Config, as_json: bool) -> NoReturn:
    for directory in (settings.home, settings.run_dir, settings.state_dir):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    told = f"server of {settings.home}; Ctrl-C lets running inputs end and stops it, twice stops it now"
    tell(as_json, {"home": str(settings.home), "pid": os.getpid(), "listens": settings.listen}, told)
    sys.stdout.flush()
    sys.stderr.flush()
    if as_json:
        os.dup2(2, 1)  # whatever the server says, the document is over
    environ = {**os.environ, "SQUALL_HOME": str(settings.home), "PYTHONPATH": clients._python_path()}
    os.chdir("/")
    os.execve(sys.executable, [sys.executable, *clients._SAFE_PATH, "-m", "squall.server", "--stay"], environ)


def _detach(settings: config.Config, as_json: bool) -> None:
    log = settings.state_dir / "server.log"
    began = log.stat().st_size if log.exists() else 0
    clients._start_server(settings, "--stay").close()
    facts = _wait_serving(settings, str(log), began)
    document = {"running": True, **facts, "log": str(log)}
    tell(as_json, document, f"the server of {settings.home} runs, pid {facts['pid']}; its log is {log}")
    if facts["listens"] and not as_json:
        click.echo(facts["listens"])


def _wait_serving(settings: config.Config, log: str, began: int) -> dict[str, Any]:
    """What the server says of itself, once it listens everywhere it should."""
    deadline = time.monotonic() + settings.start_timeout
    while time.monotonic() < deadline:
        client = here(settings)
        if client is None:
            break
        try:
            facts = ask(client.link, GetServer())
        except ServiceError:  # it has just ended, and its log says why
            break
        finally:
            client.close()
        if facts["listens"] or not settings.listen:
            return facts
        time.sleep(LOOK_S)
    raise ServiceError(
        f"the server does not serve{f' at `{settings.listen}`' if settings.listen else ''}:\n"
        f"{clients._tail(log, began)}",
        hint=f"the whole log is `{log}`",
    )


def unit(settings: config.Config) -> str:
    """A unit file for systemd that starts this very installation with the settings in force."""
    words = [shutil.which("squall") or f"{sys.executable} -m squall.cli", "up"]
    for option, value in (("listen", settings.listen), ("tls-cert", settings.tls_cert), ("tls-key", settings.tls_key)):
        if value:
            words += [f"--{option}", shlex.quote(value)]
    return f"""[Unit]
Description=Squall server
After=network-online.target
Wants=network-online.target

[Service]
Type=exec
Environment=SQUALL_HOME={settings.home}
ExecStart={" ".join(words)}
# Reads the TLS certificate again.
ExecReload=/bin/kill -HUP $MAINPID
# The server alone is asked to end; it lets inputs finish and ends its node and containers itself. When it is killed
# they stay for the next one, which takes them over; without one they end by themselves (`reattach_grace`).
KillMode=process
TimeoutStopSec={int(settings.drain_timeout) + STOP_SECONDS}
Restart=on-failure
# Clients wait for the next one; it is up in a second.
RestartSec=100ms
# Containers get control groups of their own, and each takes a descriptor or two here.
Delegate=yes
TasksMax=infinity
LimitNOFILE=1048576

[Install]
WantedBy=multi-user.target
"""
