"""Who drives a coroutine of the SDK: said by `squall._blocking`, heard by the `Pending`s of `transport`.

Apart from both, so that a program which only defines an app does not load the transport. Tested in
`tests/unit/test_blocking.py`.
"""

from __future__ import annotations

from _thread import _local  # `threading.local`, without the millisecond that `threading` takes

driver = _local()
"""`driver.blocking` is true while a thread drives a coroutine with `squall._blocking.run`."""
