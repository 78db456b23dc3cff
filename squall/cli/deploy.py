"""`squall deploy`: from a file to a version that takes calls.

Owns finding the app that is meant and telling what became of it; deploying is the SDK's. Tested in
`tests/acceptance/test_deploy.py`.
"""

from __future__ import annotations

import contextlib
import time

import click

from squall._deploy import Deployment
from squall._output import make_output
from squall.app import App
from squall.cli.documents import json_option, own_stdout, print_json
from squall.cli.failures import Interrupted
from squall.cli.logs import Printer
from squall.cli.main import did_you_mean
from squall.cli.run import apps_of, import_script
from squall.client import Client
from squall.exception import InvalidError, NotFoundError
from squall.protocol.requests import ReadLogs


@click.command()
@click.option("-m", "as_module", is_flag=True, help="REF is a module (pkg.mod), not a file.")
@click.option("-n", "--name", default=None, help="Deploy the app under this name.")
@click.option("--tag", default="", help="Your own name of this version, for the history.")
@click.option(
    "--strategy",
    type=click.Choice(["rolling", "recreate"]),
    default="rolling",
    show_default=True,
    help="rolling: old containers end what they run. recreate: they have 10 s.",
)
@click.option("--stream-logs", is_flag=True, help="Follow the app's output afterwards, until Ctrl-C.")
@json_option
@click.argument("ref", metavar="REF")
def deploy(
    ref: str, as_module: bool, name: str | None, tag: str, strategy: str, stream_logs: bool, as_json: bool
) -> int:
    """Put an app on the server to stay.

    REF is a file (app.py), or one of several apps in it (app.py::name). Deployed again, it becomes a new version, which
    takes over without a call failing; when it cannot start, the version before goes on serving.
    """
    if as_json and stream_logs:
        raise click.UsageError("--json and --stream-logs exclude each other: `squall app logs -f --json` follows it")
    with own_stdout(as_json):
        app = find_app(ref, as_module)
        output = make_output(quiet=as_json, timestamps=False)
        try:
            done = app.deploy(name=name, tag=tag, strategy=strategy, output=output)
        except KeyboardInterrupt:
            raise Interrupted from None
        finally:
            output.close()
    if as_json:
        print_json({**vars(done), "functions": sorted(app._specs)})
    else:
        for line in told(done):
            click.echo(line)
    if stream_logs:
        _follow(done.app_id)
    return 0


def find_app(ref: str, as_module: bool) -> App:
    """The app that `ref` means; raises with what there is when it means none, or several."""
    module, wanted = import_script(ref, as_module)
    apps = apps_of(module)
    if not apps:
        raise NotFoundError(
            f"cannot deploy `{ref}`: it makes no squall.App at its top level",
            hint='make one: `app = squall.App("name")`',
        )
    if wanted is not None:
        by_name = {app.name: app for app in apps.values() if app.name}
        found = apps.get(wanted) or by_name.get(wanted)
        if found is None:
            raise NotFoundError(f"cannot deploy `{ref}`: there is no app `{wanted}`", hint=did_you_mean(wanted, apps))
        return found
    if len(apps) > 1:
        names = ", ".join(f"`{ref}::{name}`" for name in apps)
        raise InvalidError(f"`{ref}` is ambiguous: it makes {len(apps)} apps", hint=f"name one: {names}")
    return next(iter(apps.values()))


def told(done: Deployment) -> list[str]:
    """What became of a deploy, in lines."""
    lines = [f"deployed `{done.name}` version {done.version}"]
    if done.version > 1:
        lines += [f"  added {name}" for name in done.added]
        lines += [f"  removed {name}" for name in done.removed]
        lines += [f"  changed {name}: {', '.join(fields)}" for name, fields in sorted(done.changed.items())]
        if not (done.added or done.removed or done.changed):
            lines.append("  nothing changed")
    else:
        lines += [f"  {name}" for name in done.added]
    return lines + [f"  note: {text}" for text in done.notices]


def _follow(app_id: str) -> None:
    client = Client.current()
    with contextlib.suppress(KeyboardInterrupt):
        Printer(ReadLogs(follow=True, since=time.time()), timestamps=False, as_json=False).show(client, app=app_id)
