"""The journal of durable calls: their rows in the Store, as functions of a connection.

What is acknowledged is here first: inputs before `spawn` returns, results before anybody is told, cancels before they
count. `durable` decides what is written when; this file alone says how. A function runs in the Store's thread, within a
transaction shared with others, so it reads no clock and makes no id; it may be run again after one of its neighbours
failed. Rows of a call that are there already are left as they are: repeating anything is harmless. Tested in
`tests/contract/test_journal.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from squall.exception import ConflictError, Error, InvalidError
from squall.protocol.states import OutputStatus
from squall.server.bulk import are_found, insert_rows, update_rows, walking

if TYPE_CHECKING:
    from squall.server.database import Database

T = TypeVar("T")
Payload = bytes | str
"""An input's or output's bytes, or the digest of the blob that holds them."""
RESULT_DAYS = 7
CALL_DAYS = 30
"""How long it is remembered that a call was, once its result is gone."""
CANCELLED = "cancelled by the caller"
IN_LIMIT = 500
"""Values of one `IN (...)`: databases have a limit."""


class Entry(NamedTuple):
    """Inputs of a spawned call on their way to disk."""

    call_id: str
    function_id: str
    """What the caller named: which pool that is may be another after a restart."""
    app_id: str
    workspace: str
    method: str
    parent: str
    created_at: float
    items: list[tuple[int, Payload]]
    key: str = ""
    digest: str = ""
    """Of the arguments, where there is a `key`."""


class Added(NamedTuple):
    """What became of an Entry."""

    call_id: str
    """Its own, or that of the call which was first made under its key."""
    seq: int
    """Of the first of its new inputs; the others follow."""
    items: list[tuple[int, Payload]]
    """Those that were not there yet."""


class Row(NamedTuple):
    """The end of an input, as it is written."""

    call_id: str
    idx: int
    status: OutputStatus
    message: str
    hint: str
    data: Payload
    finished_at: float


class Note(NamedTuple):
    """How often an input was tried: what of it a restart must know."""

    call_id: str
    idx: int
    attempt: int
    failures: int
    infra_failures: int
    not_before: float | None


class Kept(NamedTuple):
    """An unfinished input, as a restart finds it. Its arguments stay on disk."""

    seq: int
    call_id: str
    idx: int
    attempt: int
    failures: int
    infra_failures: int
    not_before: float | None
    cancelled: bool


class KeptCall(NamedTuple):
    call_id: str
    function_id: str
    app_id: str
    method: str
    parent: str
    created_at: float
    cancelled: bool
    stopped: str = ""
    """Why its app was stopped, where it was."""


class Wanted(NamedTuple):
    """An input whose end is asked for, and the workspace in which its call must be."""

    call_id: str
    idx: int
    workspace: str


class Window(NamedTuple):
    """Some unfinished inputs in their order, and the calls they belong to."""

    inputs: list[Kept]
    calls: dict[str, KeptCall]


class Journal:
    """`durable`'s way to the Store: each method is one write (or a read in the order of the writes)."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._seq = 0
        """The last one given out; 0 until the Store was asked. Only touched by its thread."""

    def add(self, entries: Sequence[Entry]) -> Any:
        return self.database.write(lambda connection: self._add(connection, entries))

    def finish(self, rows: Sequence[Row]) -> Any:
        return self.database.write(lambda connection: finish(connection, rows))

    def note(self, rows: Sequence[Note]) -> Any:
        return self.database.write(lambda connection: note(connection, rows))

    def cancel(
        self, call_id: str, idxs: list[int] | None, workspace: str, now_wall: float, counted: bool = True
    ) -> Any:
        return self.database.write(lambda connection: cancel(connection, call_id, idxs, workspace, now_wall, counted))

    def mark(self, call_id: str, reason: str, now_wall: float) -> Any:
        return self.database.write(lambda connection: mark(connection, call_id, reason, now_wall))

    def tidy(self, call_id: str, after: int, limit: int, spared: Collection[int]) -> Any:
        return self.database.write(lambda connection: tidy(connection, call_id, after, limit, spared))

    def window(self, after: int, limit: int) -> Any:
        """A read, but a place in the order of the writes: what was added before is in it, what comes later is not."""
        return self.database.write(lambda connection: window(connection, after, limit))

    def payloads(self, seqs: Sequence[int]) -> Any:
        return self.database.read(lambda connection: payloads(connection, seqs))

    def _add(self, connection: Any, entries: Sequence[Entry]) -> list[Added | Error]:
        if not self._seq:
            self._seq = last_seq(connection)
        outcomes = add(connection, entries, self._seq + 1)
        self._seq += sum(len(outcome.items) for outcome in outcomes if isinstance(outcome, Added))
        return outcomes


# ---- in ----------------------------------------------------------------------------------------------------------


def last_seq(connection: Any) -> int:
    import sqlalchemy as sa

    from squall.server import tables

    return int(connection.execute(sa.select(sa.func.coalesce(sa.func.max(tables.inputs.c.seq), 0))).scalar_one())


def add(connection: Any, entries: Sequence[Entry], seq: int) -> list[Added | Error]:
    """Insert what is not there yet, numbered from `seq`. A client repeats a submit it has no answer to."""
    from squall.server import tables

    known = {row.call_id: row for row in _calls(connection, {entry.call_id for entry in entries})}
    outcomes: list[Added | Error] = []
    calls: dict[str, dict[str, Any]] = {}
    keys: dict[tuple[str, str], Entry] = {}
    mine: dict[str, set[int]] = {}
    rows: list[dict[str, Any]] = []
    for entry in entries:
        outcome = _keyed(connection, entry, keys) if entry.key else None
        outcome = outcome or _refusal(entry, known.get(entry.call_id) or calls.get(entry.call_id))
        if outcome is None:
            fresh = _fresh(connection, entry, entry.call_id in known, mine)
            outcome = Added(entry.call_id, seq, fresh)
            if entry.call_id not in known:
                calls.setdefault(entry.call_id, _call_row(entry))
            if entry.key:
                keys[entry.function_id, entry.key] = entry
            for idx, data in fresh:
                rows.append({"seq": seq, "call_id": entry.call_id, "idx": idx, **_columns("args", data)})
                seq += 1
        outcomes.append(outcome)
    insert_rows(connection, tables.calls, list(calls.values()))
    insert_rows(connection, tables.inputs, rows)
    _put_keys(connection, keys)
    return outcomes


def _calls(connection: Any, call_ids: Iterable[str]) -> Iterator[Any]:
    for some in _portions(list(call_ids)):
        yield from connection.execute(_calls_query(), {"call_ids": some})


@cache
def _calls_query() -> Any:
    """Made once, as all that goes with each call is: to make a statement costs as much as to run it."""
    import sqlalchemy as sa

    from squall.server import tables

    table = tables.calls
    return table.select().where(table.c.call_id.in_(sa.bindparam("call_ids", expanding=True)))


def _refusal(entry: Entry, call: Any) -> Error | None:
    if call is None:
        return None
    function_id, cancelled = (
        (call["function_id"], False) if isinstance(call, dict) else (call.function_id, call.cancelled_at is not None)
    )
    if function_id != entry.function_id:
        return InvalidError(f"call `{entry.call_id}` belongs to another function")
    if cancelled:
        return ConflictError(f"call `{entry.call_id}` was cancelled and takes no more inputs")
    return None


def _fresh(connection: Any, entry: Entry, is_known: bool, mine: dict[str, set[int]]) -> list[tuple[int, Payload]]:
    """The entry's inputs that are neither in the Store nor in an entry before it."""
    have = mine.setdefault(entry.call_id, set())
    if is_known and entry.items:
        have |= _stored_idxs(connection, entry)
    if not have and len(entry.items) == 1:
        have.add(entry.items[0][0])
        return entry.items
    fresh = []
    for item in entry.items:
        if item[0] not in have:
            have.add(item[0])
            fresh.append(item)
    return fresh


def _stored_idxs(connection: Any, entry: Entry) -> set[int]:
    import sqlalchemy as sa

    from squall.server import tables

    table = tables.inputs
    idxs = [idx for idx, _ in entry.items]
    mine = (table.c.call_id == entry.call_id) & table.c.idx.between(min(idxs), max(idxs))
    return set(connection.execute(sa.select(table.c.idx).where(mine)).scalars())


def _call_row(entry: Entry) -> dict[str, Any]:
    return {
        "call_id": entry.call_id,
        "function_id": entry.function_id,
        "app_id": entry.app_id,
        "workspace": entry.workspace,
        "method": entry.method,
        "parent": entry.parent or None,
        "created_at": entry.created_at,
    }


def _keyed(connection: Any, entry: Entry, keys: dict[tuple[str, str], Entry]) -> Added | Error | None:
    """The call that was made first under the entry's key; None when this is the first."""
    from squall.server import tables

    table = tables.keys
    before: Any = keys.get((entry.function_id, entry.key))
    if before is None:
        is_it = (table.c.function_id == entry.function_id) & (table.c.key == entry.key)
        is_it &= table.c.created_at > entry.created_at - RESULT_DAYS * 86400
        before = connection.execute(table.select().where(is_it)).first()
    if before is None or before.call_id == entry.call_id:
        return None
    if before.digest != entry.digest:
        return ConflictError(
            f"key `{entry.key[:80]}` was used for call `{before.call_id}` with other arguments",
            hint="one key names one piece of work: give this one a key of its own",
        )
    return Added(before.call_id, 0, [])


def _put_keys(connection: Any, keys: dict[tuple[str, str], Entry]) -> None:
    """An older call under the same key has been forgotten by now, so its row is replaced."""
    from squall.server import tables

    table = tables.keys
    for (function_id, key), entry in keys.items():
        connection.execute(table.delete().where((table.c.function_id == function_id) & (table.c.key == key)))
        row = {"function_id": function_id, "key": key, "call_id": entry.call_id, "digest": entry.digest}
        connection.execute(table.insert(), {**row, "created_at": entry.created_at})


# ---- out ---------------------------------------------------------------------------------------------------------


def finish(connection: Any, rows: Sequence[Row]) -> None:
    """Record ends: the first of an input wins. Its arguments are of no use any more."""
    from squall.server import tables

    ends = [
        {
            "call_id": row.call_id,
            "idx": row.idx,
            **_columns("result", row.data),
            "status": row.status,
            "message": row.message or None,
            "hint": row.hint or None,
            "finished_at": row.finished_at,
        }
        for row in rows
    ]
    update_rows(connection, tables.inputs, ends, _INPUT, unset="status", clear=("args", "args_blob"))


_INPUT = ("call_id", "idx")


def note(connection: Any, rows: Sequence[Note]) -> None:
    """Record how often inputs were tried, and until when they wait."""
    from squall.server import tables

    update_rows(connection, tables.inputs, [row._asdict() for row in rows], _INPUT, unset="status")


def cancel(
    connection: Any, call_id: str, idxs: list[int] | None, workspace: str, now_wall: float, counted: bool = True
) -> int | None:
    """Mark what has not ended as cancelled, so that a restart does not run it; how many that is, None for a call that
    this workspace never had. Their ends are recorded as they come. Of a whole call it is one row, however many inputs
    it has; they are `counted` if that is asked."""
    import sqlalchemy as sa

    from squall.server import tables

    inputs = tables.inputs
    if find_call(connection, call_id, workspace) is None:
        return None
    mine = (inputs.c.call_id == call_id) & inputs.c.status.is_(None)
    if idxs is None:
        mark(connection, call_id, CANCELLED, now_wall)
        if not counted:
            return 0
        return int(connection.execute(sa.select(sa.func.count()).select_from(inputs).where(mine)).scalar_one())
    marked = 0
    for some in _portions(idxs):
        update = inputs.update().where(mine & inputs.c.idx.in_(some)).values(cancelled_at=now_wall)
        marked += connection.execute(update).rowcount
    return marked


def mark(connection: Any, call_id: str, reason: str, now_wall: float) -> str:
    """Say of a call that all of it that has no end is cancelled; what was said first stays, and is given back."""
    import sqlalchemy as sa

    from squall.server import tables

    calls = tables.calls
    fresh = (calls.c.call_id == call_id) & calls.c.cancelled_at.is_(None)
    connection.execute(calls.update().where(fresh).values(cancelled_at=now_wall, cancel_reason=reason))
    said = connection.execute(sa.select(calls.c.cancel_reason).where(calls.c.call_id == call_id)).scalar()
    return str(said or CANCELLED)


def tidy(connection: Any, call_id: str, after: int, limit: int, spared: Collection[int]) -> int | None:
    """Give the next `limit` inputs of a cancelled call, behind the index `after`, the end that its mark says, where
    they have none. Those in `spared` still run, and have one of their own. Where to go on; None at the end of it."""
    import sqlalchemy as sa

    from squall.server import tables

    inputs = tables.inputs
    call = next(_calls(connection, [call_id]), None)
    if call is None or call.cancelled_at is None:
        return None
    mine = (inputs.c.call_id == call_id) & (inputs.c.idx > after)
    behind = sa.select(inputs.c.idx).where(mine).order_by(inputs.c.idx).limit(1).offset(limit - 1)
    with walking(connection):
        last: int | None = connection.execute(behind).scalar()
    if last is not None:
        mine &= inputs.c.idx <= last
    still = [idx for idx in spared if idx > after and (last is None or idx <= last)]
    if still:  # as literals: there may be more than a statement may have parameters
        mine &= inputs.c.idx.not_in(sa.bindparam("still", still, expanding=True, literal_execute=True))
    end = {"status": "cancelled", "message": call.cancel_reason or CANCELLED, "finished_at": call.cancelled_at}
    gone = {"args": None, "args_blob": None}
    these = are_found(connection, inputs, inputs.c.seq, sa.select(inputs).where(mine))
    connection.execute(inputs.update().where(these & inputs.c.status.is_(None)).values({**end, **gone}))
    return last


# ---- after a restart -----------------------------------------------------------------------------------------------


def window(connection: Any, after: int, limit: int) -> Window:
    """The next unfinished inputs after the number `after`."""
    import sqlalchemy as sa

    from squall.server import tables

    t = tables.inputs.c
    wanted = sa.select(
        t.seq, t.call_id, t.idx, t.attempt, t.failures, t.infra_failures, t.not_before, t.cancelled_at.is_not(None)
    )
    query = wanted.where(t.status.is_(None) & (t.seq > after)).order_by(t.seq).limit(limit)
    found = [Kept(*row) for row in connection.execute(query)]
    calls = list(_calls(connection, {kept.call_id for kept in found}))
    stopped = _stopped(connection, {row.app_id for row in calls})
    return Window(found, {row.call_id: _kept_call(row, stopped.get(row.app_id, "")) for row in calls})


def _kept_call(row: Any, stopped: str) -> KeptCall:
    method, parent, cancelled = row.method, row.parent or "", row.cancelled_at is not None
    return KeptCall(row.call_id, row.function_id, row.app_id, method, parent, row.created_at, cancelled, stopped)


def _stopped(connection: Any, app_ids: set[str]) -> dict[str, str]:
    """Which of these apps were stopped, and why."""
    import sqlalchemy as sa

    from squall.server import tables

    t = tables.apps.c
    found: dict[str, str] = {}
    for some in _portions(list(app_ids)):
        query = sa.select(t.app_id, t.reason).where(t.app_id.in_(some) & (t.state == "stopped"))
        found.update((app_id, reason or "it ended") for app_id, reason in connection.execute(query))
    return found


def payloads(connection: Any, seqs: Sequence[int]) -> dict[int, Payload]:
    """The arguments of inputs, by their numbers."""
    import sqlalchemy as sa

    from squall.server import tables

    t = tables.inputs.c
    found: dict[int, Payload] = {}
    for some in _portions(list(seqs)):
        for seq, args, blob in connection.execute(sa.select(t.seq, t.args, t.args_blob).where(t.seq.in_(some))):
            found[seq] = blob or args or b""
    return found


# ---- what is too old -----------------------------------------------------------------------------------------------


def expire(connection: Any, now_wall: float, limit: int) -> int:
    """Delete results past their days, up to `limit`, and what is remembered of them past theirs; how many went."""
    import sqlalchemy as sa

    from squall.server import tables

    inputs, calls, keys = tables.inputs, tables.calls, tables.keys
    # In the words of the indexes' conditions, as literals, or they are not used.
    is_kept, is_expired = sa.text("status IS NOT NULL AND status <> 'expired'"), sa.text("status = 'expired'")
    oldest = sa.select(inputs).order_by(inputs.c.finished_at).limit(limit)
    some = oldest.where(is_kept & (inputs.c.finished_at < now_wall - RESULT_DAYS * 86400))
    gone = {"status": "expired", "result": None, "result_blob": None, "args": None, "args_blob": None}
    these = are_found(connection, inputs, inputs.c.seq, some)
    with walking(connection):
        expired = connection.execute(inputs.update().where(these).values(gone)).rowcount
    old = sa.select(keys.c.function_id, keys.c.key).where(keys.c.created_at < now_wall - RESULT_DAYS * 86400)
    named = sa.tuple_(keys.c.function_id, keys.c.key)
    dropped = connection.execute(keys.delete().where(named.in_(old.limit(limit)))).rowcount
    forgotten = oldest.where(is_expired & (inputs.c.finished_at < now_wall - CALL_DAYS * 86400))
    these = are_found(connection, inputs, inputs.c.seq, forgotten)
    with walking(connection):
        deleted = connection.execute(inputs.delete().where(these)).rowcount
    left = sa.exists().where(inputs.c.call_id == calls.c.call_id)
    ended = (calls.c.created_at < now_wall - CALL_DAYS * 86400) & ~left
    some = sa.select(calls.c.call_id).where(ended).limit(limit)
    left_over = connection.execute(calls.delete().where(calls.c.call_id.in_(some))).rowcount
    return int(max(expired, dropped, deleted, left_over))


def awaited_blobs(connection: Any) -> set[str]:
    """Digests of arguments that are still to be used, however old they are."""
    import sqlalchemy as sa

    from squall.server import tables

    t = tables.inputs.c
    return set(
        connection.execute(sa.select(t.args_blob).where(t.status.is_(None) & t.args_blob.is_not(None))).scalars()
    )


# ---- looked at ------------------------------------------------------------------------------------------------------


def find_call(connection: Any, call_id: str, workspace: str) -> Any:
    """The row of a call; None when there is none in this workspace."""
    from squall.server import tables

    table = tables.calls
    mine = (table.c.call_id == call_id) & (table.c.workspace == workspace)
    return connection.execute(table.select().where(mine)).first()


def find_outputs(connection: Any, wanted: Sequence[Wanted]) -> list[Any]:
    """Of each the row of its input, with what its call's mark says of a cancel; None when the call has no such input,
    False when there is no such call."""
    rows: dict[tuple[str, int], Any] = {}
    for some in _alike(wanted):
        names = {"call_ids": list({one.call_id for one in some}), "idxs": list({one.idx for one in some})}
        for row in connection.execute(_outputs(), names):
            rows[row.call_id, row.idx] = row
    return [_seen(connection, one, rows.get((one.call_id, one.idx))) for one in wanted]


def _alike(wanted: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    """Parts that one query finds and nothing else: several inputs of a call, or one input each of several calls."""
    by_call: dict[str, list[Wanted]] = {}
    for one in wanted:
        by_call.setdefault(one.call_id, []).append(one)
    by_idx: dict[int, list[Wanted]] = {}
    for mine in by_call.values():
        if len(mine) == 1:
            by_idx.setdefault(mine[0].idx, []).append(mine[0])
        else:
            yield from _portions(mine)
    for mine in by_idx.values():
        yield from _portions(mine)


@cache
def _outputs() -> Any:
    import sqlalchemy as sa

    from squall.server import tables

    inputs, calls = tables.inputs.c, tables.calls.c
    columns = (inputs.call_id, inputs.idx, inputs.status, inputs.result, inputs.result_blob)
    words = (inputs.message, inputs.hint, inputs.finished_at)
    query = sa.select(*columns, *words, calls.workspace, calls.cancelled_at, calls.cancel_reason)
    query = query.join(tables.calls, calls.call_id == inputs.call_id)
    mine = inputs.call_id.in_(sa.bindparam("call_ids", expanding=True))
    return query.where(mine & inputs.idx.in_(sa.bindparam("idxs", expanding=True)))


def _seen(connection: Any, one: Wanted, row: Any) -> Any:
    if row is not None and row.workspace == one.workspace:
        return row
    return False if find_call(connection, one.call_id, one.workspace) is None else None


def find_inputs(connection: Any, call_ids: list[str], limit: int) -> list[Any]:
    """Up to `limit` inputs of some calls, in their order, with what they call."""
    import sqlalchemy as sa

    from squall.server import tables

    inputs, calls = tables.inputs.c, tables.calls.c
    found: list[Any] = []
    status = sa.case((inputs.status.is_(None) & calls.cancelled_at.is_not(None), "cancelled"), else_=inputs.status)
    for some in _portions(call_ids):
        query = sa.select(inputs.call_id, inputs.idx, status.label("status"), calls.function_id, calls.method)
        query = query.join(tables.calls, calls.call_id == inputs.call_id).where(inputs.call_id.in_(some))
        found += connection.execute(query.order_by(inputs.seq).limit(limit - len(found)))
    return found


def find_children(connection: Any, input_ids: list[str]) -> list[Any]:
    """The spawned calls that these inputs made."""
    from squall.server import tables

    table = tables.calls
    found: list[Any] = []
    for some in _portions(input_ids):
        found += connection.execute(table.select().where(table.c.parent.in_(some)).order_by(table.c.created_at))
    return found


def count_inputs(connection: Any, call_id: str) -> dict[str, int]:
    """How many inputs of a call are in which state; `pending` are those that have not ended."""
    import sqlalchemy as sa

    from squall.server import tables

    t = tables.inputs
    counted = sa.select(t.c.status, sa.func.count()).where(t.c.call_id == call_id).group_by(t.c.status)
    return {status or "pending": n for status, n in connection.execute(counted)}


def _columns(prefix: str, data: Payload) -> dict[str, Any]:
    if isinstance(data, str):
        return {prefix: None, f"{prefix}_blob": data}
    return {prefix: data, f"{prefix}_blob": None}


def _portions(values: list[T]) -> Iterator[list[T]]:
    for start in range(0, len(values), IN_LIMIT):
        yield values[start : start + IN_LIMIT]
