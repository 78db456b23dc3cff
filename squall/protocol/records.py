"""What all dataclasses of the wire have in common. Standard library only, as `import squall` loads it.

Tested in `tests/unit/test_messages.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any


class Record:
    """Compares and shows a dataclass. Written once here: generated for each of 50, they would take a third of the time
    that `import squall` takes."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._values() == other._values()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._values().items())})"

    def _values(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
