"""Handles by name: what stands for a function or class of a deployed app until it is first used.

Owns the question to the server and its answer, once for all handles made from one `from_name`, and the live settings of
the autoscaler. Making one does no I/O. Tested in `tests/unit/test_lookup.py` and `tests/integration/test_deploys.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from squall._blocking import both
from squall.exception import InvalidError
from squall.options import checked_name

if TYPE_CHECKING:
    from squall.function import Function


class Lookup:
    """A function, or class, of a deployed app, and where it was found."""

    def __init__(self, app: str, name: str, version: int = 0, environment: str = "", is_class: bool = False) -> None:
        self.app = app
        self.name = name
        self.version = version
        self.environment = environment
        self.is_class = is_class
        self.function_id = ""
        self.is_generator = False
        self.shape: dict[str, Any] = {}

    async def find(self) -> None:
        """Ask the server, if nobody did yet. Raises NotFoundError that says what there is instead."""
        if self.function_id:
            return
        from squall.client import Client  # by now somebody calls the function
        from squall.protocol.requests import LookupFunction

        client = Client.current()
        reply, _ = await client.request(LookupFunction(self.app, self.name, self.environment, self.version))
        self._check_kind(bool(reply.data["shape"]))
        self.is_generator, self.shape = bool(reply.data["is_generator"]), dict(reply.data["shape"])
        self.function_id = str(reply.data["function_id"])

    def _check_kind(self, is_class: bool) -> None:
        if is_class and not self.is_class:
            raise InvalidError(
                f"`{self.name}` of app `{self.app}` is a class",
                hint=f"look it up with `squall.Cls.from_name({self.app!r}, {self.name!r})`",
            )
        if self.is_class and not is_class:
            raise InvalidError(
                f"`{self.name}` of app `{self.app}` is a function",
                hint=f"look it up with `squall.Function.from_name({self.app!r}, {self.name!r})`",
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return Lookup, (self.app, self.name, self.version, self.environment, self.is_class)


def checked_lookup(
    app_name: object, name: object, version: object, environment_name: object, *, is_class: bool
) -> Lookup:
    """The arguments of a `from_name`. Raises InvalidError."""
    noun = "Cls" if is_class else "Function"
    app = app_name if isinstance(app_name, str) and app_name.startswith("ap-") else checked_name(app_name, "app name")
    if not isinstance(name, str) or not name:
        raise InvalidError(
            f"`{noun}.from_name` takes the name of a {'class' if is_class else 'function'}, not {name!r}"
        )
    if "." in name and not is_class:
        cls, _, method = name.partition(".")
        raise InvalidError(
            f"`{name}` is a method, and `Function.from_name` finds functions",
            hint=f"`squall.Cls.from_name({app!r}, {cls!r})().{method}`",
        )
    if version is not None and (isinstance(version, bool) or not isinstance(version, int) or version < 1):
        raise InvalidError(f"`version={version!r}` is no number of a version", hint="they are counted from 1")
    environment = "" if environment_name is None else checked_name(environment_name, "environment name")
    return Lookup(app, name, version or 0, environment, is_class)


class Autoscaler:
    """The live settings of how many containers a function has: `fn.autoscaler`.

    What is set here takes effect at once, outlives a restart of the server, and ends with the next deploy of the app.

    Example:

        @app.function()
        def square(x): return x * x

        @app.local_entrypoint()
        def main():
            square.autoscaler.update(min_containers=2, scaledown_window=120)
            print(square.autoscaler.settings())
            square.autoscaler.update(min_containers=None)
    """

    def __init__(self, function: Function[..., Any]) -> None:
        self._function = function

    @both
    async def settings(self) -> dict[str, float]:
        """The settings that hold now, by name."""
        return await self._ask({})

    @both
    async def update(self, /, **settings: float | None) -> dict[str, float]:
        """Change `min_containers`, `max_containers`, `buffer_containers` or `scaledown_window` (seconds); None gives a
        setting back the value the function was deployed with. Returns the settings that hold now.

        Raises InvalidError for a setting there is not, or a value that is out of range.
        """
        if not settings:
            raise InvalidError("`update` was given nothing to change", hint="for instance `min_containers=1`")
        return await self._ask(dict(settings))

    async def _ask(self, settings: dict[str, Any]) -> dict[str, float]:
        from squall.protocol.requests import UpdateAutoscaler

        for name, value in settings.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise InvalidError(f"`{name}={value!r}` is not a number")
        target = await self._function._target()
        reply, _ = await target.client.request(UpdateAutoscaler(target.function_id, settings))
        return dict(reply.data["settings"])
