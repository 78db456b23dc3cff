"""App: functions, classes and entrypoints that run together.

Owns registration: it checks options and scope rules at the decorator's line and keeps a `FunctionSpec` for each
function. Starting an app is `_session`'s part; calling is `function.py`'s. Tested in `tests/unit/test_app.py` and
`tests/unit/test_entrypoint.py`.
"""

from __future__ import annotations

import sys
import types
import warnings
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, overload

from squall._blocking import both, is_notebook
from squall._callables import kind_of
from squall._marks import EXIT_GRACE, Marked, Shape, check_schedulable, described, fields_of, parameter, shape_of
from squall.cls import Cls
from squall.exception import InvalidError
from squall.function import Function
from squall.options import checked_image, checked_name, not_yet, read_options, secret_fields, with_secrets
from squall.protocol.specs import FunctionSpec
from squall.secret import Secret, checked_env

if TYPE_CHECKING:
    import inspect

    from typing_extensions import Unpack, dataclass_transform

    from squall._deploy import AppInfo, Deployment
    from squall._session import AppRun, RunningApp
    from squall.client import Client, Output
    from squall.image import Image
    from squall.logs import Logs
    from squall.options import FunctionOptions

else:

    def dataclass_transform(**_: object) -> Callable[[Any], Any]:
        """Only type checkers read it."""
        return lambda decorated: decorated


P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class FunctionDecorator(Protocol):
    """What `@app.function(...)` is to a type checker: a call of an async function gives what it returns."""

    @overload
    def __call__(self, raw_f: Callable[P, Coroutine[Any, Any, R]]) -> Function[P, R]: ...
    @overload
    def __call__(self, raw_f: Callable[P, R]) -> Function[P, R]: ...


_NOT_YET = frozenset(
    {
        "server",
        "get_dashboard_url",
    }
)

_apps: weakref.WeakSet[App] = weakref.WeakSet()
_siblings: dict[str, str] = {}
"""In a container: tag -> id of every function of its app."""


class LocalEntrypoint:
    """A function that runs in your own program and starts the work; `squall run` calls it with the app running.

    Made by `@app.local_entrypoint()`. Calling it calls the plain function, which needs the app to run:

    Example:

        @app.function()
        def square(x): return x * x

        @app.local_entrypoint()
        def main(n: int = 3):
            print(list(square.map(range(n))))
    """

    def __init__(self, name: str, raw_f: Callable[..., Any], app: App) -> None:
        self.name = name
        self.raw_f = raw_f
        self.app = app

    @property
    def signature(self) -> inspect.Signature:
        """The parameters, with annotations as objects where they can be evaluated."""
        import inspect  # the command line asks; a program that defines an app does not

        try:
            return inspect.signature(self.raw_f, eval_str=True)
        except Exception:  # an annotation that does not evaluate here
            return inspect.signature(self.raw_f)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.raw_f(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<LocalEntrypoint `{self.name}`>"


class App:
    """A set of functions that run, and are stopped, together.

    - `name`: what `squall app list` and `squall app stop` call it; 1 to 64 letters, digits, dashes, dots and
      underscores. Without one, the name of the script.
    - `image`: what the containers of functions that name no image see; `Image.host()` when left out.
    - `env`, `secrets`: in the environment of every function of the app; what a function names itself wins, and
      `env` wins over `secrets`.
    - `include_source`: False leaves your source out of the containers, which must then find it in their image.
    - `tags`: labels of your own, strings; kept with the app where it is deployed.

    Raises InvalidError at this line for a wrong option.

    Example:

        app = squall.App("hello")

        @app.function()
        def square(x): return x * x

        @app.local_entrypoint()
        def main():
            print(square.remote(4))
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        image: Image | None = None,
        secrets: Sequence[Secret] | None = None,
        env: Mapping[str, str | None] | None = None,
        include_source: bool = True,
        tags: Mapping[str, str] | None = None,
        **unknown: object,
    ) -> None:
        for option in unknown:
            raise (
                not_yet(f"App({option}=...)")
                if option in ("volumes",)
                else InvalidError(
                    f"`App` has no option `{option}`", hint="options: env, image, include_source, name, secrets, tags"
                )
            )
        self.name = None if name is None else checked_name(name, "app name")
        if image is not None:
            checked_image(image, f"`App(image={image!r})` takes an Image")
        if not isinstance(include_source, bool):
            raise InvalidError(f"`App(include_source={include_source!r})` takes True or False")
        self._image = image
        self._secrets = secret_fields(list(secrets or ()))
        self._env = {**self._secrets.pop("secret_env"), **checked_env(env or {}, "App(env)")}
        self._include_source = include_source
        self.tags = _checked_tags(tags)
        self._functions: dict[str, Function[..., Any]] = {}
        self._classes: dict[str, Cls[Any]] = {}
        self._specs: dict[str, FunctionSpec] = {}
        self._by_value: set[str] = set()
        self._without_source: set[str] = set()
        self._images: dict[str, Image] = {}
        """By tag, of the functions whose image has to be built."""
        self._entrypoints: dict[str, LocalEntrypoint] = {}
        self._running: RunningApp | None = None
        self._deployed_id = ""
        """Of the deployed app that this is, or stands for."""
        self._packing = False
        _apps.add(self)

    @property
    def registered_functions(self) -> dict[str, Function[..., Any]]:
        """The functions of this app by their tags."""
        return dict(self._functions)

    @property
    def registered_classes(self) -> dict[str, Cls[Any]]:
        """The classes of this app by their tags."""
        return dict(self._classes)

    @property
    def registered_entrypoints(self) -> dict[str, LocalEntrypoint]:
        """The local entrypoints of this app by their names."""
        return dict(self._entrypoints)

    @property
    def app_id(self) -> str | None:
        """Its id while it runs, or once it was deployed or looked up."""
        return self._deployed_id or None if self._running is None else self._running.app_id

    @property
    def logs(self) -> Logs:
        """What the app's containers have written: of the run that goes on, else of the latest of its name."""
        from squall.logs import Logs
        from squall.protocol.requests import ReadLogs

        async def target() -> tuple[Client, ReadLogs]:
            from squall.client import Client

            running = self._running
            if running is not None:
                return running.client, ReadLogs(app=running.app_id)
            if self.name is None:
                raise InvalidError("an app without a name has logs while it runs only", hint="give the `App` a name")
            return Client.current(), ReadLogs(app=self.name)

        return Logs(target)

    # -- registration

    def function(self, *wrong: Any, **options: Unpack[FunctionOptions]) -> FunctionDecorator:
        """Make a function callable in containers. All options are keywords; None means the default.

        - `cpu=0.125`: cores kept free for a container, and its share when all are busy. `(1, 2)`: 1 core kept, never
          more than 2 used; without a limit, 16 cores more than asked for.
        - `memory=128`: MiB kept free for a container. `(256, 512)`: killed above 512 MiB; no limit of its own without.
        - `gpu=None`: `"H100"`, `"H100:2"`, `"any"`, or a list in order of preference.
        - `image`: what the container sees; the app's when left out.
        - `env`, `secrets`: its environment, a dict and a list of Secret.
        - `timeout=300`: seconds of one attempt at an input, 1 to 86,400; then its container is killed.
        - `startup_timeout`: seconds a container may take to import your code; `timeout` when left out.
        - `retries=0`: how often a failed input is tried again, a number (1 s apart) or a `Retries`.
        - `min_containers=0`: kept alive while the app runs; `max_containers`: never more (4,000 without);
          `buffer_containers=0`: idle ones kept ahead while inputs come.
        - `scaledown_window=60`: seconds a container stays idle before it ends, 2 to 3,600.
        - `single_use_containers=False`: True gives each input a container that no other input sees.
        - `block_network=False`: True leaves a container nothing but its own loopback.
        - `name`: the function's name in the app; that of the `def` when left out.
        - `serialized=False`: True sends the function by value, so that it may be defined anywhere.
        - `include_source`: False leaves your source out of its containers; the app's choice when left out.
        - `is_generator`: True for a plain function that returns a generator.
        - `schedule`: a `Cron` or a `Period`: when the app is deployed, the function is called at these times. All its
          arguments must have defaults.

        Raises InvalidError at this line for a wrong option, and for what a container could not find by name: a
        lambda, a method, a function inside another. `docs/guide/functions.md` describes each option.

        Example:

            @app.function(cpu=0.5, memory=(256, 512), retries=2, max_containers=4)
            def count(text):
                return len(text.split())

            @app.local_entrypoint()
            def main():
                print(list(count.map(["to be", "or not to be"])))
        """
        if wrong:
            raise InvalidError(
                "`@app.function` was used without its parentheses", hint="write `@app.function()` above the function"
            )
        fields = read_options(options)

        def decorate(raw_f: Callable[..., Any]) -> Function[..., Any]:
            return self._register(raw_f, options, fields)

        return decorate  # type: ignore[return-value]

    def _register(self, raw_f: Callable[P, R], options: Mapping[str, Any], fields: dict[str, Any]) -> Function[P, R]:
        serialized = bool(options.get("serialized"))
        _check_callable(raw_f, "@app.function()")
        _check_scope(raw_f, serialized, options.get("name"))
        tag = checked_name(options.get("name") or raw_f.__name__, "function name")
        is_generator, is_async = kind_of(raw_f)
        if options.get("is_generator") is not None:
            is_generator = bool(options["is_generator"])
        if is_generator and fields.get("retries") and fields["retries"].max_retries:
            raise InvalidError(
                f"generator `{tag}` has `retries`", hint="a generator that failed half way cannot resume"
            )
        if fields.get("schedules"):
            check_schedulable(raw_f, tag, is_generator=is_generator)
        spec = self._spec(tag, raw_f, {**fields, **fields_of(raw_f)})
        spec.is_generator, spec.is_async = is_generator, is_async
        self._add(spec, raw_f, options)
        function: Function[P, R] = Function(tag, raw_f, self, is_generator)
        self._functions[tag] = function
        return function

    @dataclass_transform(field_specifiers=(parameter,), kw_only_default=True)
    def cls(self, *wrong: Any, **options: Unpack[FunctionOptions]) -> Callable[[type[T]], Cls[T]]:
        """Make a class whose methods run in containers and share them. The options are those of `@app.function`.

        Methods carry `@squall.method()`, hooks `@squall.enter()` and `@squall.exit()`, parameters are declared with
        `squall.parameter()`. A container holds one object of the class for all its inputs. Bases may bring methods,
        hooks and parameters.

        Raises InvalidError at this line for a wrong option and for a class that does not fit: without methods, with
        an `__init__` that has arguments, inside a function. `docs/guide/classes.md` tells more.

        Example:

            @app.cls(max_containers=2)
            class Tally:
                start: int = squall.parameter(default=0)

                @squall.enter()
                def begin(self):
                    self.total = self.start

                @squall.method()
                def add(self, n):
                    self.total += n
                    return self.total

            @app.local_entrypoint()
            def main():
                print(Tally(start=100).add.remote(1))
        """
        if wrong:
            raise InvalidError("`@app.cls` was used without its parentheses", hint="write `@app.cls()` above the class")
        if options.get("is_generator") is not None:
            raise InvalidError("`@app.cls` has no option `is_generator`", hint="`@squall.method` has it")
        if options.get("schedule") is not None:
            raise InvalidError(
                "`@app.cls` has no option `schedule`", hint="write it at a method: `@squall.method(schedule=...)`"
            )
        fields = read_options(options, "@app.cls")

        def decorate(raw: type[T]) -> Cls[T]:
            return self._register_class(raw, options, fields)

        return decorate

    def _register_class(self, raw: type[T], options: Mapping[str, Any], fields: dict[str, Any]) -> Cls[T]:
        _check_class(raw)
        _check_scope(raw, bool(options.get("serialized")), options.get("name"), "class")
        tag = checked_name(options.get("name") or raw.__name__, "class name")
        shape = shape_of(raw)
        if not shape.methods:
            raise InvalidError(
                f"class `{raw.__qualname__}` has nothing to call", hint="decorate a method with `@squall.method()`"
            )
        self._add(self._class_spec(tag, raw, fields, shape), raw, options)
        pool: Function[..., Any] = Function(tag, None, self, False)
        self._classes[tag] = Cls(pool, shape, raw)
        return self._classes[tag]

    def _class_spec(self, tag: str, raw: type, fields: dict[str, Any], shape: Shape) -> FunctionSpec:
        spec = self._spec(tag, raw, {**fields, **shape.fields})
        spec.methods, spec.parameters, spec.shape = list(shape.methods), list(shape.parameters), described(shape)
        spec.exit_grace = EXIT_GRACE if shape.exits else 0.0
        return spec

    def _add(self, spec: FunctionSpec, raw: Any, options: Mapping[str, Any]) -> None:
        """Keep a spec, in the place of another of its name."""
        tag = spec.tag
        self._warn_if_taken(tag, raw)
        self._functions.pop(tag, None)
        self._classes.pop(tag, None)
        self._specs[tag] = spec
        (self._by_value.add if options.get("serialized") else self._by_value.discard)(tag)
        include = options.get("include_source")
        include = self._include_source if include is None else include
        (self._without_source.discard if include else self._without_source.add)(tag)
        image = options.get("image") or self._image
        self._images.pop(tag, None)
        if image is not None and image._kind != "host":
            self._images[tag] = image

    def _raw_of(self, tag: str) -> Any:
        """The plain function or class behind a tag, or None."""
        if tag in self._classes:
            return self._classes[tag].raw_cls
        return self._functions[tag].raw_f if tag in self._functions else None

    def _pools(self) -> dict[str, Function[..., Any]]:
        """By tag, what has an id on the server."""
        return {**self._functions, **{tag: cls._pool for tag, cls in self._classes.items()}}

    def _spec(self, tag: str, raw_f: Any, fields: dict[str, Any]) -> FunctionSpec:
        own = {**fields, **with_secrets(self._secrets, fields)}
        env = {**self._env, **own.pop("secret_env", {}), **own.pop("plain_env", {})}
        if own.get("single_use") and (own.get("concurrency", 1) > 1 or own.get("batch_size")):
            raise InvalidError(
                f"`{tag}` has `single_use_containers` and several inputs at a time",
                hint="leave out `single_use_containers`, or `@squall.concurrent` and `@squall.batched`",
            )
        own.setdefault("startup_timeout", own.get("timeout", 300.0))
        if self._image is not None:
            own.setdefault("image", self._image._spec)
        return FunctionSpec(
            tag, raw_f.__module__, raw_f.__qualname__, env=env,
            python=f"{sys.version_info[0]}.{sys.version_info[1]}", **own,
        )  # fmt: skip

    def local_entrypoint(self, *wrong: Any, name: str | None = None) -> Callable[[Callable[..., Any]], LocalEntrypoint]:
        """Make a function what `squall run file.py` runs, here in your program; its parameters become options.

        It may be async. `name` is what it is called in `squall run file.py::name`. Raises InvalidError for a second
        entrypoint of the same name.

        Example:

            @app.local_entrypoint()
            def main(name: str = "you", times: int = 1):
                print(" ".join([f"hello {name}"] * times))
        """
        if wrong:
            raise InvalidError(
                "`@app.local_entrypoint` was used without its parentheses",
                hint="write `@app.local_entrypoint()` above the function",
            )

        def decorate(raw_f: Callable[..., Any]) -> LocalEntrypoint:
            _check_callable(raw_f, "@app.local_entrypoint()")
            entry = checked_name(name or raw_f.__name__, "entrypoint name")
            taken = self._entrypoints.get(entry)
            if taken is not None and not is_notebook() and not _is_same(taken.raw_f, raw_f):
                raise InvalidError(
                    f"the app has two local entrypoints named `{entry}`",
                    hint="rename one, or give it a name: `@app.local_entrypoint(name=...)`",
                )
            self._entrypoints[entry] = LocalEntrypoint(entry, raw_f, self)
            return self._entrypoints[entry]

        return decorate

    def _warn_if_taken(self, tag: str, raw: Any) -> None:
        taken = self._raw_of(tag)
        if taken is not None and not is_notebook() and not _is_same(taken, raw):
            kind = "class" if isinstance(raw, type) else "function"
            warnings.warn(
                f"{kind} `{tag}` replaces another of the same name in this app; give one `name=...`",
                UserWarning,
                stacklevel=5,
            )

    # -- running

    def run(
        self,
        *,
        name: str | None = None,
        detach: bool = False,
        interactive: bool = False,
        output: Output | None = None,
    ) -> AppRun:
        """Run the app while the block lasts: `with app.run():` or `async with app.run():`.

        Starts a server when none runs. At the end of the block unfinished inputs are cancelled and the containers
        end; the block waits for that, so that no output is lost.

        - `name`: run the app under another name.
        - `detach`: True lets it go on without you when the block or the program ends, as long as it has spawned
          calls to finish.
        - `interactive`: True lends this program's terminal to containers that ask for it, by `breakpoint()` or
          `squall.interact()`; it must have one.
        - `output`: an object with `log(chunk, data)` and `notice(notice)` that gets what containers write and what
          there is to say about them; without one it goes to that of `squall.enable_output()`, or else plainly to this
          program's stdout and stderr.

        Raises ConflictError when this app object is running already, InvalidError in a container, ServiceError when
        no server can be reached or started.

        Example:

            @app.function()
            def square(x): return x * x

            if __name__ == "__main__":
                with app.run():
                    print(square.remote(4))
        """
        from squall._session import AppRun  # what runs apps is not needed to define them

        return AppRun(self, name=name, detach=detach, interactive=interactive, output=output)

    # -- deployed

    @both
    async def deploy(
        self,
        *,
        name: str | None = None,
        environment_name: str | None = None,
        tag: str = "",
        strategy: str = "rolling",
        output: Output | None = None,
    ) -> Deployment:
        """Put the app on the server to stay: its functions can be called from any program, by name.

        Returns once the new version takes all calls. A container of each function was started by then; when one
        cannot start, or an image cannot be built, that is raised and the version before goes on serving. Deployed again
        under its name, the app gets a new version; inputs that wait move to it, those that run end where they run.
        Afterwards the functions of this object can be called too.

        - `name`: deploy under another name than the app's.
        - `environment_name`: in that environment instead of your own.
        - `tag`: your own name of this version, shown in the history.
        - `strategy`: `"rolling"` lets old containers end what they run; `"recreate"` gives them 10 s, after which the
          new version runs it again: for functions that leave no room beside the old containers.
        - `output`: gets what containers write from now on, as for `run`.

        Raises StartupError, BuildError, ResourceExhaustedError when no node could ever hold a function, ConflictError
        when too many deploys of the app are under way, InvalidError in a container.

        Example:

            app = squall.App("numbers")

            @app.function()
            def square(x): return x * x

            if __name__ == "__main__":
                print(app.deploy().version)
                print(squall.Function.from_name("numbers", "square").remote(7))
        """
        from squall._deploy import deploy_app  # what deploys apps is not needed to define them

        return await deploy_app(
            self, name=name, environment_name=environment_name, tag=tag, strategy=strategy, output=output
        )

    @both
    async def lookup(
        cls: Any, name: str, *, environment_name: str | None = None, create_if_missing: bool = False
    ) -> App:
        """A handle of a deployed app, or of any app by its id, without its code: to look at it, and to end it.

        - `environment_name`: look in that environment instead of your own.
        - `create_if_missing`: True makes a deployed app without functions where there is none.

        Raises NotFoundError, with the names there are.

        Example:

            app = squall.App.lookup("tools", create_if_missing=True)
            print(app.app_id, app.info().state)
            app.stop()
        """
        from squall._deploy import look_up

        checked = name if isinstance(name, str) and name.startswith("ap-") else checked_name(name, "app name")
        environment = "" if environment_name is None else checked_name(environment_name, "environment name")
        app = App()
        await look_up(app, checked, environment, create=create_if_missing)
        return app

    @both
    async def stop(self) -> None:
        """End the app on the server: its inputs are cancelled, its containers end, and calls of it raise NotFoundError.
        A deployed app keeps its name and history, and can be deployed again."""
        from squall._deploy import stop_app

        await stop_app(self)

    @both
    async def info(self) -> AppInfo:
        """What the server knows of the app now. Raises InvalidError for one that was neither run nor deployed."""
        from squall._deploy import info_of

        return await info_of(self)

    @both
    async def stats(self, *, since: float = 3600.0) -> dict[str, dict[str, Any]]:
        """How calls went in the last `since` seconds, as far as the server remembers: function -> `counts` by outcome,
        `latency_ms` and `execution_ms` as quantiles, and what waits and runs now."""
        from squall._deploy import stats_of

        return await stats_of(self, since)

    @both
    async def set_tags(self, tags: Mapping[str, str]) -> None:
        """Replace the app's tags, on the server too once it was deployed, run or looked up."""
        from squall._deploy import labels_of

        await labels_of(self, _checked_tags(tags))

    @both
    async def get_tags(self) -> dict[str, str]:
        """The app's tags, as the server has them."""
        from squall._deploy import labels_of

        return await labels_of(self, None)

    def include(self, other: App, inherit_tags: bool = True) -> App:
        """Take in the functions and classes of another app, so that an app may be written in several files. Returns
        this app. Tags are taken over too unless `inherit_tags` is False; this app's own win.

        Raises InvalidError for a name that both have.

        Example:

            tools = squall.App("tools")

            @tools.function()
            def double(x): return 2 * x

            app = squall.App("everything").include(tools)
        """
        if not isinstance(other, App) or other is self:
            raise InvalidError(f"`include` takes another App, not {other!r:.100}")
        for tag in other._specs:
            if tag in self._specs and not _is_same(self._raw_of(tag), other._raw_of(tag)):
                raise InvalidError(f"both apps have a function `{tag}`", hint="give one `name=...`")
        for tag, spec in other._specs.items():
            self._specs[tag] = spec
            for mine, theirs in (
                (self._by_value, other._by_value),
                (self._without_source, other._without_source),
            ):
                (mine.add if tag in theirs else mine.discard)(tag)
            if tag in other._images:
                self._images[tag] = other._images[tag]
        self._functions.update(other._functions)
        self._classes.update(other._classes)
        for pool in other._pools().values():
            pool._app = self
        if inherit_tags:
            self.tags = {**other.tags, **self.tags}
        return self

    def __getattr__(self, name: str) -> Any:
        if name in _NOT_YET:
            raise not_yet(f"App.{name}")
        raise AttributeError(f"`App` has no attribute `{name}`")

    def __reduce__(self) -> tuple[Any, ...]:
        return App, (self.name,)

    def __repr__(self) -> str:
        return f"<App `{self.name or 'without name'}`, {len(self._specs)} functions>"


def hydrate_apps(app_name: str, app_id: str, functions: Mapping[str, str]) -> None:
    """For the runner: give the functions of this container's app their ids.

    An app without a name, or run under another, is told by its functions: the one that has them all.
    """
    _siblings.clear()
    _siblings.update(functions)
    named = [app for app in list(_apps) if app.name == app_name]
    for app in named or [app for app in list(_apps) if set(functions) <= set(app._specs)]:
        for tag, pool in app._pools().items():
            pool._object_id = functions.get(tag, "")


def sibling_id(tag: str) -> str:
    """In a container: the id of the app's function `tag`, or empty."""
    return _siblings.get(tag, "")


# ---- rules of what may be decorated -------------------------------------------------------------------------------


def _checked_tags(tags: Mapping[str, str] | None) -> dict[str, str]:
    found = dict(tags or {})
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InvalidError(f"`App(tags={tags!r})` takes a dict of strings")
    return found


def _check_callable(raw_f: Any, decorator: str) -> None:
    if isinstance(raw_f, Marked):
        raise InvalidError(
            f"`{raw_f.__qualname__}` is a method of a class and decorated with `{decorator}`",
            hint="leave it out, and decorate the class with `@app.cls()`",
        )
    if isinstance(raw_f, Function):
        raise InvalidError(f"`{raw_f.tag}` is decorated with `{decorator}` twice", hint="keep one decorator")
    if isinstance(raw_f, LocalEntrypoint):
        raise InvalidError(
            f"`{raw_f.name}` is a local entrypoint and runs in your own program",
            hint="make it a function of the app or an entrypoint, not both",
        )
    if isinstance(raw_f, type):
        raise InvalidError(
            f"`{decorator}` decorates the class `{raw_f.__name__}`", hint="decorate a class with `@app.cls()`"
        )
    if isinstance(raw_f, (staticmethod, classmethod)) or not callable(raw_f):
        raise InvalidError(f"`{decorator}` decorates {raw_f!r:.200}", hint="it takes a function defined with `def`")
    if not hasattr(raw_f, "__name__") or not hasattr(raw_f, "__qualname__"):
        raise InvalidError(
            f"`{decorator}` decorates a `{type(raw_f).__name__}`, which is no function", hint="wrap it in a `def`"
        )


def _check_class(raw: Any) -> None:
    if isinstance(raw, Cls):
        raise InvalidError(f"`{raw.tag}` is decorated with `@app.cls()` twice", hint="keep one decorator")
    if not isinstance(raw, type):
        raise InvalidError(
            f"`@app.cls()` decorates {raw!r:.200}", hint="it takes a class; decorate a function with `@app.function()`"
        )


def _check_scope(raw_f: Any, serialized: bool, name: str | None, what: str = "function") -> None:
    """A container finds a function by its module and name, so it must be reachable by them, or travel by value."""
    qualname = raw_f.__qualname__
    if "<lambda>" in qualname and not (serialized and name):
        raise InvalidError(
            "`@app.function` decorates a lambda",
            hint='give it a name and send it by value: `serialized=True, name="..."`',
        )
    if serialized or qualname == raw_f.__name__:
        return
    if "<locals>" in qualname:
        raise InvalidError(
            f"`{qualname}` is defined inside another function, where a container cannot find it",
            hint="move it to the top level of its module, or send it by value with `serialized=True`",
        )
    if what == "class":
        raise InvalidError(f"class `{qualname}` is inside another class", hint="move it to the top level of its module")
    raise InvalidError(
        f"`{qualname}` is a method of a class",
        hint="decorate the class with `@app.cls()` and the method with `@squall.method()`",
    )


def _is_same(one: Any, other: Any) -> bool:
    """Whether two are the same lines of a file: a module that was imported again."""
    if isinstance(one, type) and isinstance(other, type):
        return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)
    a, b = getattr(one, "__code__", None), getattr(other, "__code__", None)
    return (
        isinstance(a, types.CodeType)
        and isinstance(b, types.CodeType)
        and (a.co_filename, a.co_firstlineno) == (b.co_filename, b.co_firstlineno)
    )
