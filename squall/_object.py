"""Lazy handles: an object of the server known by its id, made without any I/O and usable once it has one.

Every noun with an id builds on `Handle`. Must not talk to the server itself. Tested in `tests/unit/test_function.py`.
"""

from __future__ import annotations

from squall.exception import InvalidError


class Handle:
    """Something the server knows by `object_id`."""

    _prefix = ""
    _object_id = ""

    @property
    def object_id(self) -> str:
        """The id the server knows this by. Raises while there is none yet."""
        if not self._object_id:
            raise InvalidError(
                f"{self!r} has no id yet", hint="it gets one when its app runs: `squall run`, or `with app.run():`"
            )
        return self._object_id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._object_id or 'without id'}>"


def checked_id(value: object, prefix: str, what: str) -> str:
    """`value` as an id of the kind `prefix` names. Raises InvalidError."""
    if not isinstance(value, str) or not value.startswith(prefix) or len(value) > 64 or not value[3:].isalnum():
        raise InvalidError(f"{value!r} is no id of a {what}", hint=f"such an id looks like `{prefix}5f2c19d04be87a36`")
    return value
