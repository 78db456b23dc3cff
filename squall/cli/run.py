"""`squall run`: from a reference such as `hello.py::square` to its result.

Owns finding the app and the function or entrypoint that is meant, giving it its arguments from the command line,
running it inside `app.run()`, and what Ctrl-C does meanwhile. Importing the script, talking to the server and
following the app are the session's. Tested in `tests/unit/test_cli_run.py` and `tests/acceptance/test_cli.py`.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType, ModuleType
from typing import Any

import click
from click.shell_completion import CompletionItem

from squall._context import state
from squall._output import Output, make_output
from squall._session import AppRun, import_ref
from squall._terminal import check_terminal
from squall.app import App
from squall.cli import options
from squall.cli.failures import Interrupted, ScriptError, UserError
from squall.cli.main import UsageHint, did_you_mean
from squall.cls import Method
from squall.exception import Error, InvalidError, NotFoundError


def complete_file(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Tab completion of files, by the shell itself; what is in them is not looked at, as that may run code."""
    return [CompletionItem(incomplete, type="file")]


@dataclass
class Target:
    """What is to be run: an entrypoint here, or a function or a method in a container."""

    app: App
    name: str
    entrypoint: Any = None
    function: Any = None

    @property
    def raw_f(self) -> Any:
        return (self.entrypoint or self.function).raw_f


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    options_metavar="[OPTIONS]",
)
@click.option("-m", "as_module", is_flag=True, help="REF is a module (pkg.mod or pkg.mod::function), not a file.")
@click.option("-d", "--detach", is_flag=True, help="Leave the app and its spawned calls running at the end.")
@click.option(
    "-i",
    "--interactive",
    is_flag=True,
    help="Lend this terminal to containers: `breakpoint()` and `squall.interact()` work, no live view.",
)
@click.option("-q", "--quiet", is_flag=True, help="No live view and no notices; only what the containers write.")
@click.option("-n", "--name", default=None, help="Run the app under this name.")
@click.option(
    "-w",
    "--write-result",
    type=click.Path(dir_okay=False, writable=True),
    help="Write what it returns (text or bytes) to this file.",
)
@click.option("--timestamps", is_flag=True, help="Put the time before each line that a container writes.")
@click.option("--json", "as_json", is_flag=True, help="JSON Lines on standard output: all output, and the result last.")
@click.argument("ref", metavar="REF", shell_complete=complete_file)
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[ARGS]...")
@click.pass_context
def run(
    ctx: click.Context,
    ref: str,
    args: tuple[str, ...],
    as_module: bool,
    detach: bool,
    interactive: bool,
    quiet: bool,
    name: str | None,
    write_result: str | None,
    timestamps: bool,
    as_json: bool,
) -> int:
    """Run an entrypoint, or a function in a container.

    REF is a file (hello.py), a function or entrypoint in it (hello.py::square), or one of a certain app
    (hello.py::app.square). ARGS are options made from its parameters: `squall run hello.py --help` shows them. A
    parameter's annotation says what its option takes, else the type of its default; with neither it is text.
    """
    if interactive:
        if as_json:
            raise click.UsageError("--json and --interactive exclude each other: a terminal shows no JSON")
        check_terminal()
    output = _json_output(quiet) if as_json else None  # from now on, as the script may print while it is imported
    try:
        target = find_target(ref, as_module)
        check_writable(target.name, write_result)
        kwargs = arguments(ctx, target, f"{'-m ' if as_module else ''}{ref}", args)
        output = output or make_output(quiet=quiet, timestamps=timestamps, live=not interactive)
        app_run = target.app.run(name=name, detach=detach, interactive=interactive, output=output)
        with interrupts(app_run, output):
            result = execute(target, kwargs, app_run, output)
        if detach and not quiet:
            output.say(f"app `{app_run.name}` is left running; `squall app stop {app_run.name}` stops it")
        code = finish(target, result, write_result)
        output.result(result)
        return code
    except SystemExit as error:
        if output is not None and not error.code:
            output.result(None)
        raise
    except KeyboardInterrupt:
        raise Interrupted from None
    finally:
        if output is not None:
            output.close()


def _json_output(quiet: bool) -> Output:
    from squall._output_json import JsonOutput  # people do without

    return JsonOutput(quiet=quiet)


def arguments(ctx: click.Context, target: Target, shown_ref: str, words: tuple[str, ...]) -> dict[str, Any]:
    """What the command line gives the target for its parameters."""
    command = options.command_for(target.name, target.raw_f, signature_of(target))
    try:
        return options.parse(command, list(words), f"squall run {shown_ref}")
    except click.NoSuchOption as error:
        if any(error.option_name in option.opts for option in ctx.command.params):
            ref = shown_ref.removeprefix("-m ")
            hint = f"`{error.option_name}` is an option of `squall run`: put it before `{ref}`"
            raise UsageHint(error.format_message(), hint, error.ctx) from None
        raise


# ---- which app, which function ------------------------------------------------------------------------------------


def find_target(ref: str, as_module: bool) -> Target:
    """The entrypoint or function that `ref` means; raises with what there is when it means none, or several."""
    module, path = import_script(ref, as_module)
    apps = apps_of(module)
    if not apps:
        raise NotFoundError(
            f"cannot run `{ref}`: it makes no squall.App at its top level",
            hint='make one: `app = squall.App("name")`',
        )
    if path:
        return named_target(ref, apps, path)
    return only_target(ref, apps)


def import_script(ref: str, as_module: bool) -> tuple[ModuleType, str | None]:
    """Import the script; an exception of its own is shown with the user's frames, then told in one line."""
    try:
        return import_ref(ref, as_module)
    except (Error, KeyboardInterrupt):
        raise
    except SystemExit as error:
        raise InvalidError(
            f"cannot import `{ref}`: it exits while it is imported (with {error.code!r})",
            hint='put what shall run under `@app.local_entrypoint()` or `if __name__ == "__main__":`',
        ) from None
    except Exception as error:
        hint = ""
        if isinstance(error, ModuleNotFoundError) and error.name:
            hint = f"is `{error.name}` installed in the Python at {sys.prefix}?"
        raise ScriptError(f"cannot import `{ref}`: {type(error).__name__}: {error}", hint=hint) from error


def apps_of(module: ModuleType) -> dict[str, App]:
    """Variable name -> app, each app once."""
    found: dict[str, App] = {}
    for name, value in vars(module).items():
        if isinstance(value, App) and not any(value is other for other in found.values()):
            found[name] = value
    return found


def targets_of(app: App) -> dict[str, Target]:
    """Everything in an app that can be run, by name; an entrypoint wins over a function of its name."""
    targets = {tag: Target(app, tag, function=function) for tag, function in app.registered_functions.items()}
    for tag, cls in app.registered_classes.items():
        if cls.needed:
            continue
        instance = cls()
        for method in cls.methods:
            targets[f"{tag}.{method}"] = Target(app, f"{tag}.{method}", function=getattr(instance, method))
    targets.update({tag: Target(app, tag, entrypoint=entry) for tag, entry in app.registered_entrypoints.items()})
    return targets


def named_target(ref: str, apps: dict[str, App], path: str) -> Target:
    """`function`, or `app.function` where `app` is the variable's name."""
    variable, _, rest = path.partition(".")
    if rest and variable in apps:
        return _pick(ref, targets_of(apps[variable]), rest, f"app `{variable}`")
    hits = [targets[path] for app in apps.values() if path in (targets := targets_of(app))]
    if len(hits) > 1:
        names = [
            f"{ref.split('::')[0]}::{variable}.{path}" for variable, app in apps.items() if path in targets_of(app)
        ]
        raise InvalidError(f"`{ref}` is ambiguous: several apps have `{path}`", hint=f"name one: {_listed(names)}")
    if hits:
        return hits[0]
    everything: dict[str, Target] = {}
    for app in apps.values():
        everything.update(targets_of(app))
    return _pick(ref, everything, path, f"app `{next(iter(apps.values())).name}`" if len(apps) == 1 else "no app there")


def _pick(ref: str, targets: dict[str, Target], name: str, where: str) -> Target:
    if name in targets:
        return targets[name]
    _check_class(ref, name, targets)
    verb = "has no function or entrypoint" if where.startswith("app") else "has a function or entrypoint"
    hint = did_you_mean(name, targets) or "decorate a function with `@app.function()`"
    raise NotFoundError(f"cannot run `{ref}`: {where} {verb} `{name}`", hint=hint)


def _check_class(ref: str, name: str, targets: dict[str, Target]) -> None:
    """Raises for a class, and for a method of one that cannot be made from nothing."""
    tag = name.partition(".")[0]
    methods = [found for found in targets if found.startswith(f"{tag}.")]
    if methods:
        what = f"class `{tag}` has no method `{name[len(tag) + 1 :]}`" if "." in name else f"`{tag}` is a class"
        raise NotFoundError(f"cannot run `{ref}`: {what}", hint=f"name a method: {_listed(methods)}")
    for target in targets.values():
        cls = target.app.registered_classes.get(tag)
        if cls is not None and cls.needed:
            raise InvalidError(
                f"cannot run `{ref}`: class `{tag}` needs its parameter `{cls.needed[0]}`",
                hint="call it from a `@app.local_entrypoint()`",
            )


def only_target(ref: str, apps: dict[str, App]) -> Target:
    """Without a name: the only entrypoint there is, else the only function there is."""
    entries = _all_of(apps, "registered_entrypoints")
    candidates = entries or _callables_of(apps)
    if len(candidates) == 1:
        variable, name = candidates[0]
        return targets_of(apps[variable])[name]
    if not candidates:
        raise NotFoundError(
            f"cannot run `{ref}`: its app has no entrypoint and no function",
            hint="decorate a function with `@app.local_entrypoint()` or `@app.function()`",
        )
    several = len(apps) > 1
    names = [f"{ref}::{variable}.{name}" if several else f"{ref}::{name}" for variable, name in candidates]
    kind = "entrypoints" if entries else "functions and no entrypoint"
    raise InvalidError(f"`{ref}` is ambiguous: it has several {kind}", hint=f"name one: {_listed(names)}")


def _all_of(apps: dict[str, App], attribute: str) -> list[tuple[str, str]]:
    return [(variable, name) for variable, app in apps.items() for name in getattr(app, attribute)]


def _callables_of(apps: dict[str, App]) -> list[tuple[str, str]]:
    """As `_all_of`, functions and methods."""
    return [
        (variable, name)
        for variable, app in apps.items()
        for name, target in targets_of(app).items()
        if target.entrypoint is None
    ]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(f"`{name}`" for name in names[:10]) + more


def signature_of(target: Target) -> inspect.Signature:
    """Of a method without `self`."""
    signature = inspect.signature(target.raw_f)
    if isinstance(target.function, Method):
        return signature.replace(parameters=list(signature.parameters.values())[1:])
    return signature


# ---- running it ---------------------------------------------------------------------------------------------------


def execute(target: Target, kwargs: dict[str, Any], app_run: AppRun, output: Output) -> Any:
    """Run it inside its app. An exception of the user's code comes out as UserError, Squall's own as they are."""
    with app_run:
        try:
            return call(target, kwargs, output)
        except (Error, KeyboardInterrupt, SystemExit):
            raise
        except BrokenPipeError:
            raise
        except BaseException as error:
            raise UserError(error) from None
        finally:
            output.leaving = not app_run.detach


def call(target: Target, kwargs: dict[str, Any], output: Output) -> Any:
    words = kwargs.pop("args", ()) if options.takes_raw_arguments(signature_of(target)) else ()
    if target.entrypoint is None:
        return call_function(target.function, words, kwargs, output)
    result = target.raw_f(*words, **kwargs)
    if inspect.iscoroutine(result):
        import asyncio  # heavy; only an async entrypoint needs it

        return asyncio.run(result)
    return result


def call_function(function: Any, words: tuple[str, ...], kwargs: dict[str, Any], output: Output) -> Any:
    """Run a function in a container and show what comes back."""
    if getattr(function, "is_generator", False):
        for value in function.remote_gen(*words, **kwargs):
            output.yielded(value)
        return None
    result = function.remote(*words, **kwargs)
    output.returned(result)
    return result


def check_writable(name: str, path: str | None) -> None:
    """Refuse a place for the result before the work is done, not after."""
    if path is None:
        return
    directory = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(directory) or not os.access(directory, os.W_OK):
        why = "it is not writable" if os.path.isdir(directory) else "there is no such directory"
        raise InvalidError(f"cannot write the result of `{name}` to `{path}`: {why}", hint=f"see `{directory}`")


def finish(target: Target, result: Any, write_result: str | None) -> int:
    if write_result is None:
        return 0
    if not isinstance(result, (str, bytes)):
        raise InvalidError(
            f"cannot write the result of `{target.name}` to `{write_result}`: it is {type(result).__name__}",
            hint="return str or bytes",
        )
    try:
        with open(write_result, "wb") as file:
            file.write(result.encode() if isinstance(result, str) else result)
    except OSError as error:
        raise InvalidError(
            f"cannot write the result of `{target.name}` to `{write_result}`: {error.strerror}"
        ) from None
    return 0


# ---- Ctrl-C -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def interrupts(app_run: AppRun, output: Output) -> Iterator[None]:
    """Ctrl-C once: the app is stopped cleanly and the exit code is 130. Twice: out at once; the server, which sees
    the connection close, stops the app. SIGTERM counts as one Ctrl-C."""
    pressed = 0

    def on_signal(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed += 1
        app_run.take_terminal_back()
        if pressed > 1:
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h")  # the live view hides the cursor, and will not get to show it again
            if state.client is not None:
                state.client.say_goodbye()
            os._exit(128 + signum)
        name = app_run.name
        if app_run.detach:
            output.say(f"leaving app `{name}` running; `squall app stop {name}` stops it")
        else:
            output.say(f"stopping app `{name}` (Ctrl-C again: at once)")
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if not pressed:  # else this process is on its way out, and a second Ctrl-C on that way means: at once
            for number, handler in previous.items():
                signal.signal(number, handler)
