"""What may be written in `@app.function(...)`: every option checked and turned into fields of a `FunctionSpec`.

One row of `_READERS` per option; a value of None means the default. Must not look at the function itself (that is
`function.py`) nor talk to anybody. Tested in `tests/unit/test_options.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from squall.exception import InvalidError
from squall.protocol.specs import RetryPolicy
from squall.schedule import schedule_fields
from squall.secret import Secret, checked_env, named

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypedDict

    from squall.image import Image
    from squall.schedule import Schedule

    class FunctionOptions(TypedDict, total=False):
        """The options of `@app.function`, for type checkers; `docs/reference` describes each."""

        image: Image | None
        env: Mapping[str, str | None] | None
        secrets: Sequence[Secret] | None
        gpu: str | Sequence[str] | None
        cpu: float | tuple[float, float] | None
        memory: int | tuple[int, int] | None
        timeout: int
        startup_timeout: int | None
        retries: int | Retries | None
        min_containers: int | None
        max_containers: int | None
        buffer_containers: int | None
        scaledown_window: int | None
        serialized: bool
        name: str | None
        single_use_containers: bool
        block_network: bool
        include_source: bool | None
        is_generator: bool | None
        schedule: Schedule | None


NAME_LIMIT = 64
DAY_S = 86_400

NOT_YET = frozenset(
    {
        "volumes",
        "ephemeral_disk",
        "proxy",
        "cloud",
        "region",
        "routing_region",
        "nonpreemptible",
        "enable_memory_snapshot",
        "restrict_modal_access",
        "i6pn",
        "experimental_options",
        "mounts",
        "network_file_systems",
    }
)


def not_yet(what: str, hint: str = "") -> InvalidError:
    """The error for what the design knows and this release does not have."""
    return InvalidError(f"`{what}` is not available in this release", hint=hint)


class Retries:
    """How often and how soon a failed input is tried again, for `@app.function(retries=...)`.

    - `max_retries`: further attempts after the first.
    - `initial_delay=1.0`: seconds before the first of them, 0 to 60.
    - `backoff_coefficient=2.0`: what each further delay is multiplied by, 1 to 10.
    - `max_delay=60.0`: seconds no delay is longer than, 1 to 60.

    Raises InvalidError for a value out of range.

    Example:

        @app.function(retries=squall.Retries(max_retries=3, initial_delay=0.1))
        def flaky():
            import random
            if random.random() < 0.1:
                raise OSError("no luck")
            return "done"

        @app.local_entrypoint()
        def main():
            print(flaky.remote())
    """

    def __init__(
        self,
        max_retries: int,
        backoff_coefficient: float = 2.0,
        initial_delay: float = 1.0,
        max_delay: float = 60.0,
    ) -> None:
        self.max_retries = _whole("Retries(max_retries)", max_retries, 0)
        self.backoff_coefficient = _number("Retries(backoff_coefficient)", backoff_coefficient, 1, 10)
        self.initial_delay = _number("Retries(initial_delay)", initial_delay, 0, 60)
        self.max_delay = _number("Retries(max_delay)", max_delay, 1, 60)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Retries) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    def __repr__(self) -> str:
        return f"Retries({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def read_options(options: Mapping[str, Any], where: str = "@app.function") -> dict[str, Any]:
    """Fields of a `FunctionSpec` for the options that become such. Raises InvalidError."""
    fields: dict[str, Any] = {}
    for name, value in options.items():
        reader = _READERS.get(name)
        if reader is None:
            if name not in _FLAGS:
                raise _unknown(name, where)
            _check_flag(name, value)
        elif value is not None or name == "timeout":
            fields.update(reader(value))
    _check_limits(fields)
    return fields


def variant_fields(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of a `FunctionSpec` for the options of a variant. Raises InvalidError for what a variant has in common
    with what it is made from."""
    for name in options:
        if name in _FLAGS:
            raise InvalidError(f"`{where}` cannot change `{name}`", hint="it belongs to how the code is sent")
        if name == "schedule":
            raise InvalidError(f"`{where}` cannot change `schedule`", hint="a schedule calls the function itself")
    fields = read_options(options, where)
    if "image" in fields and fields["image"].kind != "host":
        raise InvalidError(
            f"`{where}` cannot change to an image that has to be built",
            hint="give the image to the function, the class or the app; make one of each where you need two",
        )
    env = {**fields.pop("secret_env", {}), **fields.pop("plain_env", {})}
    return {**fields, "env": env} if env else fields


def concurrency_fields(max_inputs: Any, target_inputs: Any, where: str) -> dict[str, Any]:
    """Fields of a spec for inputs that run at the same time. Raises InvalidError."""
    most = _whole(f"{where}(max_inputs)", max_inputs, 1, 1000)
    target = 0 if target_inputs is None else _whole(f"{where}(target_inputs)", target_inputs, 1, most)
    return {"concurrency": most, "target_concurrency": target}


def batch_fields(max_batch_size: Any, wait_ms: Any, where: str) -> dict[str, Any]:
    """Fields of a spec for inputs that run in one call. Raises InvalidError."""
    size = _whole(f"{where}(max_batch_size)", max_batch_size, 1, 1000)
    return {"batch_size": size, "batch_wait": _number(f"{where}(wait_ms)", wait_ms, 0, 600_000) / 1000}


def merged_fields(before: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a variant of a variant."""
    merged = {**before, **fields}
    if "env" in before and "env" in fields:
        merged["env"] = {**before["env"], **fields["env"]}
    return {**merged, **with_secrets(before, fields)}


def _unknown(name: str, where: str) -> InvalidError:
    if name in NOT_YET:
        return not_yet(f"{where}({name}=...)")
    import difflib  # only for an error; costs 4 ms

    known = sorted({*_READERS, *_FLAGS})
    close = difflib.get_close_matches(name, known, 1, 0.6)
    hint = f"did you mean `{close[0]}`?" if close else f"options: {', '.join(known)}"
    return InvalidError(f"`{where}` has no option `{name}`", hint=hint)


def _check_flag(name: str, value: Any) -> None:
    if name == "name":
        if value is not None:
            checked_name(value, "function name")
    elif value is not None and not isinstance(value, bool):
        raise InvalidError(f"option `{name}` is {value!r}, it takes True or False")


def _check_limits(fields: Mapping[str, Any]) -> None:
    low, high = fields.get("min_containers", 0), fields.get("max_containers", 0)
    if high and low > high:
        raise InvalidError(
            f"option `min_containers` is {low}, more than `max_containers`, {high}",
            hint=f"`max_containers={low}` would allow for it",
        )


_NAME_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


def checked_name(value: Any, what: str) -> str:
    """`value` as the name of an object. Raises InvalidError."""
    if not isinstance(value, str):
        raise InvalidError(f"{what} is {value!r}, a `{type(value).__name__}`", hint="a name is a string")
    if not 1 <= len(value) <= NAME_LIMIT or not _NAME_CHARS.issuperset(value):
        raise InvalidError(
            f"{what} `{value[: 2 * NAME_LIMIT]}` is not a valid name",
            hint=f"1 to {NAME_LIMIT} letters, digits, dashes, dots and underscores",
        )
    return value


# ---- readers: option value -> spec fields ---------------------------------------------------------------------------


def _number(name: str, value: Any, low: float, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidError(f"option `{name}` is {value!r}, it takes a number", hint=_range(low, high))
    if not low <= value <= high:
        raise InvalidError(f"option `{name}` is {value!r}, out of range", hint=_range(low, high))
    return float(value)


def _whole(name: str, value: Any, low: int, high: float = math.inf) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidError(f"option `{name}` is {value!r}, it takes a whole number", hint=_range(low, high))
    if not low <= value <= high:
        raise InvalidError(f"option `{name}` is {value!r}, out of range", hint=_range(low, high))
    return value


def _range(low: float, high: float) -> str:
    return f"it is at least {low:.10g}" if high == math.inf else f"it is from {low:.10g} to {high:.10g}"


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    """`request` or `(request, limit)`; 0 stands for no limit given."""
    if not isinstance(value, (tuple, list)):
        return value, 0
    if len(value) != 2:
        raise InvalidError(f"option `{name}` is {value!r}", hint="give a number, or two: (request, limit)")
    return value[0], value[1]


def _read_cpu(value: Any) -> dict[str, Any]:
    request, limit = _pair("cpu", value)
    cpu = _number("cpu", request, 0.001, 4096)
    if limit and _number("cpu limit", limit, 0.001, 4096) < cpu:
        raise InvalidError(f"option `cpu` is {value!r}: its limit is below its request")
    return {"cpu": cpu, "cpu_limit": float(limit)}


def _read_memory(value: Any) -> dict[str, Any]:
    request, limit = _pair("memory", value)
    memory = _whole("memory", request, 1, 1 << 30)
    if limit and _whole("memory limit", limit, 1, 1 << 30) < memory:
        raise InvalidError(f"option `memory` is {value!r}: its limit is below its request")
    return {"memory_mib": memory, "memory_limit_mib": int(limit)}


def _read_gpu(value: Any) -> dict[str, Any]:
    wanted = [value] if isinstance(value, str) else value
    if not isinstance(wanted, (list, tuple)) or not wanted:
        raise InvalidError(f"option `gpu` is {value!r}", hint=_GPU_HINT)
    return {"gpu": [_gpu(entry) for entry in wanted]}


_GPU_HINT = 'write `gpu="H100"`, `gpu="H100:2"`, `gpu="any"`, or a list of these in order of preference'


def _gpu(entry: Any) -> str:
    if not isinstance(entry, str):
        raise InvalidError(f"option `gpu` holds {entry!r}, a `{type(entry).__name__}`", hint=_GPU_HINT)
    kind, colon, count = entry.partition(":")
    clean = kind.replace("-", "").replace("_", "").replace("!", "")
    if not clean.isascii() or not clean.isalnum() or (colon and not (count.isdecimal() and 1 <= int(count[:4]) <= 64)):
        raise InvalidError(f"option `gpu` holds `{entry}`, which names no GPU", hint=_GPU_HINT)
    name = "any" if kind.lower() == "any" else kind.upper()
    return f"{name}:{int(count)}" if colon else name


def _read_retries(value: Any) -> dict[str, Any]:
    if isinstance(value, Retries):
        return {"retries": RetryPolicy(**vars(value))}
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidError(
            f"option `retries` is {value!r}", hint="give a whole number or `squall.Retries(max_retries=...)`"
        )
    count = _whole("retries", value, 0)
    return {"retries": RetryPolicy(count, backoff_coefficient=1.0, initial_delay=1.0)}


def _read_image(value: Any) -> dict[str, Any]:
    return {"image": checked_image(value, f"option `image` is {value!r}")._spec}


def checked_image(value: Any, problem: str) -> Image:
    """`value`, which has to be an Image. Raises InvalidError."""
    from squall.image import Image  # whoever has one has loaded it

    if not isinstance(value, Image):
        raise InvalidError(problem, hint="give `squall.Image.host()`")
    return value


def _read_timeout(value: Any) -> dict[str, Any]:
    return {"timeout": _number("timeout", value, 1, DAY_S)}


def read_secrets(value: Any) -> dict[str, str]:
    """The values of a list of secrets merged, later ones winning."""
    if isinstance(value, Secret) or not isinstance(value, (list, tuple)):
        raise InvalidError(
            f"option `secrets` is {value!r}", hint="give a list: `secrets=[squall.Secret.from_dict(...)]`"
        )
    merged: dict[str, str] = {}
    for secret in value:
        if not isinstance(secret, Secret):
            raise InvalidError(
                f"option `secrets` holds a `{type(secret).__name__}`", hint="use `squall.Secret.from_dict({...})`"
            )
        merged.update(secret._values)
    return merged


def secret_fields(value: Any) -> dict[str, Any]:
    """Fields of a spec for a list of secrets: values given in the program, and names of those the server keeps."""
    fields: dict[str, Any] = {"secret_env": read_secrets(value)}
    refs, keys = named(value)
    return {**fields, **({"secrets": refs} if refs else {}), **({"secret_keys": keys} if keys else {})}


def with_secrets(below: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The secrets of both, those of `fields` last."""
    refs = [ref for ref in below.get("secrets", ()) if ref not in fields.get("secrets", ())]
    merged = {
        "secrets": [*refs, *fields.get("secrets", ())],
        "secret_keys": {**below.get("secret_keys", {}), **fields.get("secret_keys", {})},
    }
    return {name: value for name, value in merged.items() if value}


def _field(name: str, check: Callable[[str, Any, Any, Any], Any], low: float, high: float = math.inf) -> Any:
    return lambda value: {name: check(name, value, low, high)}


def _flag_field(option: str, field: str) -> Callable[[Any], dict[str, Any]]:
    def read(value: Any) -> dict[str, Any]:
        _check_flag(option, value)
        return {field: value}

    return read


_READERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "image": _read_image,
    "env": lambda value: {"plain_env": checked_env(value, "env")},
    "secrets": lambda value: secret_fields(value),
    "gpu": _read_gpu,
    "cpu": _read_cpu,
    "memory": _read_memory,
    "timeout": _read_timeout,
    "startup_timeout": _field("startup_timeout", _number, 1, DAY_S),
    "retries": _read_retries,
    "min_containers": _field("min_containers", _whole, 0),
    "max_containers": _field("max_containers", _whole, 1),
    "buffer_containers": _field("buffer_containers", _whole, 0),
    "scaledown_window": _field("scaledown_window", _number, 2, 3600),
    "single_use_containers": _flag_field("single_use_containers", "single_use"),
    "block_network": _flag_field("block_network", "block_network"),
    "schedule": schedule_fields,
}
_FLAGS = frozenset({"serialized", "name", "include_source", "is_generator"})
