"""Many rows in one statement: what the journal writes for each input, written for hundreds at a time.

SQLite takes a list of rows quickly as it is. For PostgreSQL the rows go as one array a column: a statement for each
row, even pipelined, costs two to three times as much, half of it in this process. Rows are dicts that all have the same
keys, and hold values as the columns' types take them. Owns no table: whose rows they are is its callers' business.
Tested in `tests/contract/test_bulk.py` over each backend that is present.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def insert_rows(connection: Any, table: Any, rows: Rows) -> None:
    """Insert them all, or raise."""
    if not rows:
        return
    if connection.dialect.name != "postgresql":
        connection.execute(_insert(table), rows)
        return
    names = tuple(rows[0])
    statement = f"INSERT INTO {table.name} ({', '.join(names)}) SELECT * FROM {_arrays(table, names)}"
    connection.exec_driver_sql(statement, _columns(connection, table, names, rows))


def update_rows(
    connection: Any, table: Any, rows: Rows, by: tuple[str, ...], *, unset: str = "", clear: tuple[str, ...] = ()
) -> None:
    """Give the row that has a dict's values in the columns `by` its other values. Rows that are not there are passed
    over, and where `unset` names a column, rows in which it has a value. Of two dicts for one row, the first counts
    then, and the last otherwise. The columns `clear` become NULL."""
    if not rows:
        return
    names = tuple(rows[0])
    if connection.dialect.name != "postgresql":
        statement = _update(table, names, by, unset, clear)
        connection.execute(statement, [{f"new_{name}": row[name] for name in names} for row in rows])
        return
    text = _joined_update(table, names, by, unset, clear)
    connection.exec_driver_sql(text, _columns(connection, table, names, _one_each(rows, by, first=bool(unset))))


@cache
def _insert(table: Any) -> Any:
    """Made once: to make a statement costs as much as to run it."""
    return table.insert()


@cache
def _joined_update(table: Any, names: tuple[str, ...], by: tuple[str, ...], unset: str, clear: tuple[str, ...]) -> str:
    """Each row is looked up by the index of `by`, whatever the planner believes: its statistics of a table that is
    being filled are of a moment when nearly nothing was in it, and a plan of that moment reads all unfinished rows for
    each that it updates. `OFFSET 0` keeps it from joining, and from asking for `unset`, in any other order."""
    settings = [f"{name} = found.{name}" for name in names if name not in by] + [f"{name} = NULL" for name in clear]
    mine = " AND ".join(f"{table.name}.{name} = new.{name}" for name in by)
    is_open = f"{table.name}.{unset} IS NULL" if unset else "TRUE"
    looked_up = f"SELECT {table.name}.ctid AS place, {is_open} AS is_open FROM {table.name} WHERE {mine} OFFSET 0"
    listed = f"{_arrays(table, names)} AS new({', '.join(names)})"
    found = f"SELECT new.*, old.place FROM {listed} CROSS JOIN LATERAL ({looked_up}) AS old WHERE old.is_open"
    return (
        f"UPDATE {table.name} SET {', '.join(settings)} FROM ({found}) AS found WHERE {table.name}.ctid = found.place"
    )


def are_found(connection: Any, table: Any, key: Any, query: Any) -> Any:
    """The condition of a statement that changes the rows which a select of `table` finds, whatever columns it names;
    `key` is the table's. They are found first and then looked up one by one, whatever the planner of PostgreSQL
    believes of a table that is being filled: a step that changes a thousand rows must not read a million."""
    import sqlalchemy as sa

    if connection.dialect.name != "postgresql":
        return key.in_(query.with_only_columns(key))
    place: Any = sa.literal_column(f"{table.name}.ctid")
    return place == sa.any_(sa.func.array(query.with_only_columns(place).scalar_subquery()))


@contextlib.contextmanager
def walking(connection: Any) -> Iterator[None]:
    """Within it, PostgreSQL takes rows in the order of an index, and no more of them than are asked for, where it would
    believe that reading and sorting all is as cheap. A statement that fails takes this back with all else."""
    is_postgres = connection.dialect.name == "postgresql"
    for setting in _SORTS if is_postgres else ():
        connection.exec_driver_sql(f"SET LOCAL {setting} = off")
    yield
    for setting in _SORTS if is_postgres else ():
        connection.exec_driver_sql(f"SET LOCAL {setting} = on")


_SORTS = ("enable_sort", "enable_bitmapscan")


def _one_each(rows: Rows, by: tuple[str, ...], *, first: bool) -> Rows:
    """Which of two values for one row a joined update takes is for the database to choose: give it one."""
    which = {tuple(row[name] for name in by): row for row in (reversed(rows) if first else rows)}
    return list(which.values())


@cache
def _update(table: Any, names: tuple[str, ...], by: tuple[str, ...], unset: str, clear: tuple[str, ...]) -> Any:
    import sqlalchemy as sa

    mine = sa.and_(*(table.c[name] == sa.bindparam(f"new_{name}") for name in by))
    if unset:
        mine &= table.c[unset].is_(None)
    values: dict[str, Any] = {name: sa.bindparam(f"new_{name}") for name in names if name not in by}
    return table.update().where(mine).values({**values, **dict.fromkeys(clear)})


@cache
def _arrays(table: Any, names: tuple[str, ...]) -> str:
    """A FROM item of one column for each name, filled by a parameter for each."""
    from sqlalchemy.dialects import postgresql

    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    kinds = [table.c[name].type.compile(dialect=dialect) for name in names]
    return f"unnest({', '.join(f'%s::{kind}[]' for kind in kinds)})"


def _columns(connection: Any, table: Any, names: tuple[str, ...], rows: Rows) -> tuple[list[Any], ...]:
    """The rows turned over: the values of each column, as its type gives them to the driver."""
    columns = []
    for name in names:
        kind = table.c[name].type
        values = [row[name] for row in rows]
        prepare = kind.dialect_impl(connection.dialect).bind_processor(connection.dialect)
        if kind.python_type in (float, bytes):  # an array has one type: no whole numbers or views of bytes among them
            prepare = kind.python_type
        if prepare is not None:
            values = [None if value is None else prepare(value) for value in values]
        columns.append(values)
    return tuple(columns)
