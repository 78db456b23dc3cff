"""Dataclasses that cost nothing until somebody looks. Of the standard library only what `import squall` loads anyhow.

What `dataclass` generates for each of a hundred classes would take longer than all else that an App loads, and
`dataclasses` itself loads `inspect`. So making, comparing and showing are written once here, from the class's
annotations. A `Record` becomes a dataclass like any other when its fields are first asked for, by `msgspec` or by
`dataclasses`; programs and containers have no reason to. Tested in `tests/unit/test_records.py`.
"""

from __future__ import annotations

from _thread import RLock
from typing import TYPE_CHECKING, Any

MISSING: Any = type("MISSING", (), {"__repr__": lambda _: "MISSING"})()
"""What a field has that has no default, or nothing that makes one."""

if TYPE_CHECKING:
    from dataclasses import dataclass as record
    from dataclasses import field
    from typing import TypeVar

    R = TypeVar("R", bound="Record")

    __all__ = ["MISSING", "Record", "defaults_of", "field", "record", "replaced"]
else:

    class field:
        """How a field of a `Record` comes by its value when none is given, and whether it has a place among others."""

        __slots__ = ("default", "default_factory", "kw_only")

        def __init__(self, *, default=MISSING, default_factory=MISSING, kw_only=False) -> None:
            self.default = default
            self.default_factory = default_factory
            self.kw_only = kw_only

    def record(cls: type) -> type:
        """Marks a `Record`. What is made for each input is a plain dataclass instead: it is made faster."""
        cls.__dataclass_fields__ = _MadeWhenAsked(cls)
        return cls


_FIELDS = "__dataclass_fields__"
_LAYOUTS: dict[type, dict[str, Any]] = {}
_PLACES: dict[type, tuple[str, ...]] = {}
_lock = RLock()  # `dataclass` asks for the fields of the bases meanwhile


class _MadeWhenAsked:
    """The fields of a class as `dataclasses` knows them. Whoever looks finds a dataclass, as if it had always been."""

    def __init__(self, cls: Any) -> None:
        self.cls = cls

    def __get__(self, *_: object) -> dict[str, Any]:
        with _lock:
            if vars(self.cls)[_FIELDS] is self:
                _become_dataclass(self.cls)
        return vars(self.cls)[_FIELDS]  # type: ignore[no-any-return]


def _become_dataclass(cls: Any) -> None:
    import dataclasses

    _layout(cls)  # while what it is read from is still there
    for name, mark in list(vars(cls).items()):
        if type(mark) is field:
            given = {key: getattr(mark, key) for key in field.__slots__}
            setattr(cls, name, dataclasses.field(**{k: value for k, value in given.items() if value is not MISSING}))
    dataclasses.dataclass(init=False, eq=False, repr=False)(cls)


def _layout(cls: Any) -> dict[str, Any]:
    """Name -> `field`, of a `Record` or of any dataclass. Raises TypeError for anything else."""
    found = _LAYOUTS.get(cls)
    if found is None:
        made = next((vars(base)[_FIELDS] for base in cls.__mro__ if _FIELDS in vars(base)), None)
        found = _of_annotations(made.cls) if isinstance(made, _MadeWhenAsked) else _of_dataclass(cls)
        _PLACES[cls] = tuple(name for name, mark in found.items() if not mark.kw_only)
        _LAYOUTS[cls] = found
    return found


def _of_annotations(cls: Any) -> dict[str, Any]:
    found: dict[str, Any] = {} if cls.__base__ is Record else dict(_layout(cls.__base__))
    for name, annotation in cls.__annotations__.items():
        if not annotation.startswith("ClassVar"):
            value = vars(cls).get(name, MISSING)
            found[name] = value if type(value) is field else field(default=value)
    return found


def _of_dataclass(cls: Any) -> dict[str, Any]:
    import dataclasses

    def known(value: Any) -> Any:
        return MISSING if value is dataclasses.MISSING else value

    return {
        one.name: field(default=known(one.default), default_factory=known(one.default_factory), kw_only=one.kw_only)
        for one in dataclasses.fields(cls)
    }


def defaults_of(cls: type) -> dict[str, Any]:
    """Name -> default, or MISSING, of each field."""
    return {
        name: mark.default if mark.default_factory is MISSING else mark.default_factory()
        for name, mark in _layout(cls).items()
    }


def replaced(one: R, **changes: Any) -> R:
    """A copy with other values in these fields."""
    return type(one)(**{**one._values(), **changes})


class Record:
    """Base of what `record` marks, and of the plain dataclasses that are compared and shown as such."""

    __hash__ = None  # type: ignore[assignment]

    if not TYPE_CHECKING:

        def __init__(self, *args: Any, **values: Any) -> None:
            cls = type(self)
            fields = _LAYOUTS.get(cls) or _layout(cls)
            places = _PLACES[cls]
            if len(args) > len(places) or not fields.keys() >= values.keys() or values.keys() & places[: len(args)]:
                raise TypeError(f"`{cls.__name__}` has not got these fields: {args!r:.200}, {values!r:.200}")
            values.update(zip(places, args, strict=False))
            for name, mark in fields.items():
                if name in values:
                    value = values[name]
                elif mark.default_factory is not MISSING:
                    value = mark.default_factory()
                elif mark.default is not MISSING:
                    value = mark.default
                else:
                    raise TypeError(f"`{cls.__name__}` needs `{name}`")
                setattr(self, name, value)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._values() == other._values()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._values().items())})"

    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _layout(type(self))}
