"""`squall shell`: a terminal in a running container, or in one that is made for it and ends with it.

A container of its own is made by an app with one function, which has the options of the function or class it stands
for and does nothing but write its environment down; so image, limits, source, network and secrets are those of the real
one, and none of the user's code has run. Tested in `tests/acceptance/test_shell.py`.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from typing import Any

import click
from click.shell_completion import CompletionItem

from squall._session import PlainOutput, built_spec, prepare
from squall.app import App
from squall.cli.documents import own_stdout
from squall.cli.exec import CapturedExec, Exec, exec_json_option, told, wants_pty
from squall.cli.main import did_you_mean
from squall.cli.manage import ask, complete, connect, resolve
from squall.cli.run import apps_of, complete_file, import_script
from squall.client import Client
from squall.exception import NotFoundError, ServiceError
from squall.function import Function
from squall.image import Image
from squall.protocol.images import settings_of
from squall.protocol.messages import CreateApp, FunctionSpec, ImageSpec, RetryPolicy, StopApp
from squall.protocol.requests import ListObjects
from squall.runner.profile import PROFILE

SHELL = "command -v bash >/dev/null && exec bash; exec sh"
READ_PROFILE = f". {PROFILE}; rm -f {PROFILE}; "
DAY_S = 86_400.0


def complete_ref(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Containers that run, images, and files."""
    known = [CompletionItem(word) for noun in ("container", "image") for word in complete(noun)(ctx, param, incomplete)]
    return known if incomplete.startswith(("co-", "im-")) else [*known, *complete_file(ctx, param, incomplete)]


@click.command()
@click.option("-c", "--cmd", default="", help="Run this shell command instead of a shell; the exit code is its own.")
@click.option("-m", "as_module", is_flag=True, help="REF is a module (pkg.mod::function), not a file.")
@click.option("--pty/--no-pty", default=None, help="Give it a terminal; by default when this is one.")
@exec_json_option
@click.argument("ref", required=False, default="", shell_complete=complete_ref)
@click.pass_context
def shell(ctx: click.Context, ref: str, cmd: str, as_module: bool, pty: bool | None, as_json: bool) -> None:
    """Open a shell in a container.

    REF is a running container or an image (an id or the beginning of one), or a function or class in a file
    (hello.py::square): a container with its image, source, environment and limits is made. Without REF, one of
    `Image.host()`. Where the image has a command of its own (`Image.cmd`), that runs in place of a shell.
    """
    if as_json and not cmd:
        raise click.UsageError("--json is for one command: give it with --cmd")
    kind = CapturedExec if as_json else Exec
    use_pty = wants_pty(pty, as_json)
    if ref.startswith("co-"):
        client = connect()
        found = resolve(client.link, "container", ref)
        job = kind(client.link, found, ["/bin/sh", "-c", cmd or SHELL], pty=use_pty, workdir="")
        ctx.exit(told(job, job.run()))
    with own_stdout(as_json):
        spec, blobs = spec_for(ref, as_module)
        job, code = run_in(Client.current(), shell_spec(spec), blobs, cmd or default_command(spec), use_pty, kind)
    ctx.exit(told(job, code))


def spec_for(ref: str, as_module: bool) -> tuple[FunctionSpec, list[bytes]]:
    """The spec that a container like what REF names has, and the source it needs."""
    if not ref:
        return FunctionSpec("shell"), []
    if ref.startswith("im-"):
        return FunctionSpec("shell", image=image_spec(ref)), []
    module, name = import_script(ref, as_module)
    found = {tag: app for app in apps_of(module).values() for tag in app._specs}
    if not found:
        raise NotFoundError(f"`{ref}` has no function or class", hint="decorate one with `@app.function()`")
    tag = name or next(iter(found))
    if tag not in found or (not name and len(found) > 1):
        what = f"has no function or class `{tag}`" if name else "has several functions and classes"
        raise NotFoundError(f"`{ref}` {what}", hint=did_you_mean(tag if name else "", found))
    return _prepared(found[tag], tag)


def image_spec(ref: str) -> ImageSpec:
    """An image that was built here, whatever of it was removed since built again."""
    return built_spec(Image.from_id(resolve(Client.current().link, "image", ref)), None)


def default_command(spec: FunctionSpec) -> str:
    """What runs when nothing was asked for: the command of the image, or a shell."""
    words = settings_of(spec.image.steps).cmd
    return f"exec {shlex.join(words)}" if words else SHELL


def _prepared(app: App, tag: str) -> tuple[FunctionSpec, list[bytes]]:
    prepared = prepare(app)
    spec = next(spec for spec in prepared.specs if spec.tag == tag)
    if tag in app._images:
        spec.image = built_spec(app._images[tag], None)
    return spec, [data for digest, data in prepared.blobs.items() if digest in (spec.source, *spec.source_parts)]


def shell_spec(spec: FunctionSpec) -> FunctionSpec:
    """As `spec`, but for what runs: a function of ours, one container of it, as long as the shell lasts."""
    return dataclasses.replace(
        FunctionSpec("shell"),
        module="squall.runner.profile",
        qualname="write",
        source=spec.source,
        source_parts=spec.source_parts,
        python=spec.python,
        image=spec.image,
        cpu=spec.cpu,
        cpu_limit=spec.cpu_limit,
        memory_mib=spec.memory_mib,
        memory_limit_mib=spec.memory_limit_mib,
        gpu=spec.gpu,
        env=spec.env,
        secrets=spec.secrets,
        secret_keys=spec.secret_keys,
        block_network=spec.block_network,
        min_containers=1,
        max_containers=1,
        timeout=DAY_S,
        scaledown_window=DAY_S,
        retries=RetryPolicy(),
    )


def run_in(
    client: Client, spec: FunctionSpec, blobs: list[bytes], command: str, pty: bool, kind: type[Exec]
) -> tuple[Exec, int]:
    """Make a container, run `command` in it, end it; the command and its exit code."""
    for data in blobs:
        client.put_blob(data)
    made = ask(client.link, CreateApp("shell", [spec]))
    app_id = str(made["app_id"])
    client.follow(app_id, PlainOutput())
    try:
        extra = {"TERM": os.environ.get("TERM", "xterm")}
        _write_profile(str(made["functions"][spec.tag]), [*sorted(spec.env), *_secret_keys(client, spec)], extra)
        job = kind(client.link, _container_of(client, app_id), argv_of(command), pty=pty, workdir="")
        return job, job.run()
    finally:
        if client.usable():
            ask(client.link, StopApp(app_id, "the shell has ended"))


def _secret_keys(client: Client, spec: FunctionSpec) -> list[str]:
    """Variables that secrets kept by the server bring; those of another environment are not listed here."""
    if not spec.secrets:
        return []
    rows = ask(client.link, ListObjects("secrets")).get("rows", [])
    return sorted({key for row in rows if row["name"] in spec.secrets for key in row["keys"]} - set(spec.env))


def _write_profile(function_id: str, names: list[str], extra: dict[str, str]) -> None:
    """This is the first input, so what keeps the container from starting is raised here."""
    function: Function[..., Any] = Function.from_id(function_id)
    function._tag = "the shell's container"
    function.remote(names, extra)


def argv_of(command: str) -> list[str]:
    return ["/bin/sh", "-c", READ_PROFILE + command]


def _container_of(client: Client, app_id: str) -> str:
    for row in ask(client.link, ListObjects("containers", app=app_id))["rows"]:
        if row["state"] == "ready":
            return str(row["container_id"])
    raise ServiceError("the shell's container ended before the shell began")
