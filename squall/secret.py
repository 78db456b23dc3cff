"""Secret: environment values that reach only the containers that name them.

Values given in the program are kept here until the app is made and are never shown: not by `repr`, not in an error. Of
a secret that the server keeps only the name is here. Tested in `tests/unit/test_options.py` and
`tests/integration/test_secrets.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from squall.exception import InvalidError

VALUE_LIMIT = 32_768
RESERVED_PREFIX = "SQUALL_"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Secret:
    """Named values for the environment of a function's containers.

    They are sent to a container only after its walls were checked, over the connection of its own runner; they are
    in no log and no error, and the server's database holds them sealed. Values have at most 32,768 characters; names
    starting with `SQUALL_` are refused. Of a variable in several secrets the last one's value counts, but values given
    in the program count before those of secrets that the server keeps.

    Example:

        @app.function(secrets=[squall.Secret.from_dict({"API_KEY": "..."})])
        def call_api():
            import os
            return len(os.environ["API_KEY"])

        @app.local_entrypoint()
        def main():
            print(call_api.remote())
    """

    def __init__(self, values: Mapping[str, str], label: str, ref: str = "", keys: Iterable[str] = ()) -> None:
        self._values = dict(values)
        self._label = label
        self._ref = ref
        """Name of a secret that the server keeps, `NAME` or `ENVIRONMENT/NAME`."""
        self._keys = list(keys)

    @classmethod
    def from_dict(cls, env_dict: Mapping[str, str | None] | None = None) -> Secret:
        """Values given in the program; keys whose value is None are left out."""
        return cls(checked_env({} if env_dict is None else env_dict, "Secret.from_dict"), "from_dict")

    @classmethod
    def from_local_environ(cls, env_keys: Iterable[str]) -> Secret:
        """Values of variables of this process's environment; a missing one raises InvalidError.

        In a container, where they are not needed again, missing ones are left out.

        Example:

            path = squall.Secret.from_local_environ(["PATH"])
        """
        keys = [env_keys] if isinstance(env_keys, str) else list(env_keys)
        missing = [key for key in keys if key not in os.environ]
        if missing and "SQUALL_IS_REMOTE" not in os.environ:
            raise InvalidError(
                f"`Secret.from_local_environ` names {_quoted(missing)}, not set in this environment",
                hint="export them before starting, or use `Secret.from_dict`",
            )
        found = {key: os.environ[key] for key in keys if key in os.environ}
        return cls(checked_env(found, "Secret.from_local_environ"), "from_local_environ")

    @classmethod
    def from_dotenv(cls, path: str | os.PathLike[str] | None = None, *, filename: str = ".env") -> Secret:
        """Values of a `.env` file: that in `path` or one of its parents (default: the working directory's).

        Lines are `KEY=value`, `export` allowed, quotes taken off, `#` comments; variables in values are not expanded.
        `path` may name the file itself; `filename` is what it is called. Raises InvalidError when there is none.
        """
        file = _find_dotenv(os.fspath(path) if path is not None else os.getcwd(), filename)
        if file is None:
            if "SQUALL_IS_REMOTE" in os.environ:
                return cls({}, "from_dotenv")
            raise InvalidError(
                f"`Secret.from_dotenv` found no file `{filename}` in `{path or os.getcwd()}` or above it",
                hint="give the directory or the file's name: `Secret.from_dotenv(path, filename=...)`",
            )
        with open(file, encoding="utf-8") as stream:
            return cls(checked_env(_parse_dotenv(stream.read(), file), file), "from_dotenv")

    @classmethod
    def from_name(cls, name: str, *, environment_name: str | None = None, required_keys: Iterable[str] = ()) -> Secret:
        """A secret that the server keeps: `squall secret create NAME KEY=VALUE` puts it there.

        Its values never come here: the server gives them to containers when they start, those of that moment, so that
        one that runs keeps what it has when they are replaced. `environment_name`: that of another environment of the
        workspace. `required_keys`: variables that it must hold. A secret that is not there, or lacks one of them, is a
        NotFoundError when the app is made, and when a container would start.

        Example:

            db = squall.Secret.from_name("db", required_keys=["PASSWORD"])
        """
        keys = [required_keys] if isinstance(required_keys, str) else list(required_keys)
        for what, given in (("name", name), ("environment_name", environment_name or "main")):
            if not isinstance(given, str) or not NAME.fullmatch(given):
                raise InvalidError(
                    f"`Secret.from_name({what}={given!r:.80})` is not a name",
                    hint="use 1 to 64 letters, digits, `-`, `_` and `.`, beginning with a letter or digit",
                )
        if not all(isinstance(key, str) for key in keys):
            raise InvalidError(f"`Secret.from_name({name!r}, required_keys=...)` takes a list of strings")
        return cls({}, f"from_name({name!r})", f"{environment_name}/{name}" if environment_name else name, keys)

    def __repr__(self) -> str:
        return f"<Secret.{self._label}>" if self._ref else f"<Secret.{self._label}: {len(self._values)} values>"


def named(secrets: Iterable[Secret]) -> tuple[list[str], dict[str, list[str]]]:
    """Of a list of secrets, those that the server keeps, and the keys that each must have."""
    refs: dict[str, list[str]] = {}
    for secret in secrets:
        if secret._ref:
            refs[secret._ref] = sorted({*refs.pop(secret._ref, []), *secret._keys})
    return list(refs), {ref: keys for ref, keys in refs.items() if keys}


def checked_env(values: object, where: str) -> dict[str, str]:
    """`values` as an environment; None values are left out. Raises InvalidError, which never shows a value."""
    if not isinstance(values, Mapping):
        raise InvalidError(f"`{where}` takes a dict of strings, not a `{type(values).__name__}`")
    checked = {}
    for key, value in values.items():
        if not isinstance(key, str) or not key.isascii() or not key.isidentifier():
            raise InvalidError(
                f"`{where}` has the key `{key!s}`, which cannot name an environment variable",
                hint="keys are letters, digits and underscores, and do not start with a digit",
            )
        if key.startswith(RESERVED_PREFIX):
            raise InvalidError(f"`{where}` sets `{key}`; names that start with `{RESERVED_PREFIX}` are Squall's own")
        if value is None:
            continue
        if not isinstance(value, str):
            raise InvalidError(
                f"`{where}`: the value of `{key}` is a `{type(value).__name__}`", hint="values are strings; use `str()`"
            )
        if len(value) > VALUE_LIMIT or "\0" in value:
            why = (
                "contains a zero byte" if "\0" in value else f"has {len(value)} characters, the limit is {VALUE_LIMIT}"
            )
            raise InvalidError(f"`{where}`: the value of `{key}` {why}")
        checked[key] = value
    return checked


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _find_dotenv(start: str, filename: str) -> str | None:
    here = os.path.abspath(start)
    if os.path.isfile(here):
        return here
    while True:
        candidate = os.path.join(here, filename)
        if os.path.isfile(candidate):
            return candidate
        parent = os.path.dirname(here)
        if parent == here:
            return None
        here = parent


def _parse_dotenv(text: str, file: str) -> dict[str, str]:
    """`KEY=value` lines, `export` allowed, quotes taken off, `#` comments; no expansion of variables."""
    values: dict[str, str] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        key, equals, value = line.removeprefix("export ").partition("=")
        if not equals:
            raise InvalidError(f"`{file}` line {number} is not of the form `KEY=value`")
        values[key.strip()] = _dotenv_value(value.strip())
    return values


def _dotenv_value(value: str) -> str:
    if value[:1] in ("'", '"'):
        quote = value[0]
        end = value.find(quote, 1)
        while quote == '"' and end > 0 and value[end - 1] == "\\":
            end = value.find(quote, end + 1)
        inner = value[1:end] if end > 0 else value[1:]
        if quote == '"':
            for escaped, plain in (("\\n", "\n"), ("\\t", "\t"), ('\\"', '"'), ("\\\\", "\\")):
                inner = inner.replace(escaped, plain)
        return inner
    return value.split(" #", 1)[0].rstrip()
