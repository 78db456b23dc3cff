"""The Store's schema, as SQLAlchemy Core tables. Imported only by the writer thread (it costs 0.65 s).

Times are seconds since the epoch. Who owns a table: apps, versions, functions -> `objects`; kept_apps -> `kept`; calls,
keys, inputs -> `journal`; containers -> `metering`; backoffs -> `backoffs`; tokens, workspaces, environments -> `auth`;
secrets -> `vault`; schedules -> `schedules`. Nobody else writes it. How a change here reaches Stores that exist:
`migrations/__init__.py`.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

metadata = sa.MetaData()

LARGE = sa.BigInteger().with_variant(sa.Integer, "sqlite")
"""A whole number beyond 2,147,483,647: sizes in bytes, counters that never end."""


class Words(sa.types.TypeDecorator[str]):
    """Text that a user's code or a tenant's container wrote: what a database refuses in it (NUL, halves of surrogate
    pairs) becomes a replacement character, or a result with such a message could never be stored."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        if value is None or (value.isascii() and "\0" not in value):
            return value
        return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


meta = sa.Table(
    "meta",
    metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

apps = sa.Table(
    "apps",
    metadata,
    sa.Column("app_id", sa.String(32), primary_key=True),
    sa.Column("name", sa.String(64), nullable=False, index=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("detached", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("stopped_at", sa.Float),
    sa.Column("reason", Words),
    sa.Column("workspace", sa.String(32), nullable=False, server_default="main"),
    sa.Column("environment", sa.String(64), nullable=False, server_default="main"),
    sa.Column("deployed", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("version", sa.Integer, nullable=False, server_default="0"),
    sa.Column("labels", sa.Text),
)

versions = sa.Table(
    "versions",
    metadata,
    sa.Column("app_id", sa.String(32), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("facts", sa.Text, nullable=False),
    sa.Column("box", sa.LargeBinary),
)
"""`facts` are who, how and what, as JSON; `box` is the sealed definition, none once it is not kept."""

kept_apps = sa.Table(
    "kept_apps",
    metadata,
    sa.Column("app_id", sa.String(32), primary_key=True),
    sa.Column("workspace", sa.String(32), nullable=False),
    sa.Column("environment", sa.String(64), nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("box", sa.LargeBinary, nullable=False),
)
"""Apps that are running, with all that they are made from."""

functions = sa.Table(
    "functions",
    metadata,
    sa.Column("function_id", sa.String(32), primary_key=True),
    sa.Column("app_id", sa.String(32), nullable=False, index=True),
    sa.Column("tag", sa.String(256), nullable=False),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("root_id", sa.String(32)),
    sa.Column("box", sa.LargeBinary),
    sa.Column("override", sa.Text),
)
"""By what callers name. Of a variant, `root_id` is what it varies and `box` are its options and parameters, sealed."""

calls = sa.Table(
    "calls",
    metadata,
    sa.Column("call_id", sa.String(32), primary_key=True),
    sa.Column("function_id", sa.String(32), nullable=False, index=True),
    sa.Column("app_id", sa.String(32), nullable=False),
    sa.Column("created_at", sa.Float, nullable=False, index=True),
    sa.Column("workspace", sa.String(32), nullable=False, server_default="main"),
    sa.Column("method", sa.String(256), nullable=False, server_default=""),
    sa.Column("parent", sa.String(80), index=True),
    sa.Column("cancelled_at", sa.Float),
    sa.Column("cancel_reason", Words),
)
"""`parent` is the input that made the call, in a container; none for those made by programs. What has no end yet of a
call with `cancelled_at` is cancelled, for `cancel_reason`, but for what still runs."""

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("function_id", sa.String(32), primary_key=True),
    sa.Column("key", sa.String(256), primary_key=True),
    sa.Column("call_id", sa.String(32), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("created_at", sa.Float, nullable=False, index=True),
)
"""Idempotency keys: which call was the first made under one, and what its arguments were."""

inputs = sa.Table(
    "inputs",
    metadata,
    sa.Column("seq", LARGE, primary_key=True, autoincrement=False),
    sa.Column("call_id", sa.String(32), nullable=False),
    sa.Column("idx", sa.Integer, nullable=False),
    sa.Column("args", sa.LargeBinary),
    sa.Column("args_blob", sa.String(64)),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
    sa.Column("failures", sa.Integer, nullable=False, server_default="0"),
    sa.Column("infra_failures", sa.Integer, nullable=False, server_default="0"),
    sa.Column("not_before", sa.Float),
    sa.Column("cancelled_at", sa.Float),
    sa.Column("status", sa.String(16)),
    sa.Column("result", sa.LargeBinary),
    sa.Column("result_blob", sa.String(64)),
    sa.Column("message", Words),
    sa.Column("hint", Words),
    sa.Column("finished_at", sa.Float),
    sa.UniqueConstraint("call_id", "idx", name="uq_inputs_of_call"),
)
"""`seq` is the order in which they were accepted, and a restart keeps it."""

sa.Index(
    "ix_inputs_unfinished",
    inputs.c.seq,
    sqlite_where=inputs.c.status.is_(None),
    postgresql_where=inputs.c.status.is_(None),
)

# What goes next is at the head of one of these, however many have gone before: a step looks at no more than it changes.
_KEPT, _EXPIRED = sa.text("status IS NOT NULL AND status <> 'expired'"), sa.text("status = 'expired'")
sa.Index("ix_inputs_kept", inputs.c.finished_at, sqlite_where=_KEPT, postgresql_where=_KEPT)
sa.Index("ix_inputs_expired", inputs.c.finished_at, sqlite_where=_EXPIRED, postgresql_where=_EXPIRED)

containers = sa.Table(
    "containers",
    metadata,
    sa.Column("container_id", sa.String(32), primary_key=True),
    sa.Column("function_id", sa.String(32), nullable=False, index=True),
    sa.Column("app_id", sa.String(32), nullable=False, index=True),
    sa.Column("node_id", sa.String(32), nullable=False),
    sa.Column("cpu", sa.Float, nullable=False),
    sa.Column("memory_mib", sa.Integer, nullable=False),
    sa.Column("gpus", sa.Integer, nullable=False),
    sa.Column("requested_at", sa.Float, nullable=False, index=True),
    sa.Column("started_at", sa.Float),
    sa.Column("stopped_at", sa.Float),
    sa.Column("exit_code", sa.Integer),
    sa.Column("reason", Words),
    sa.Column("cpu_seconds", sa.Float),
    sa.Column("memory_peak_bytes", LARGE),
    sa.Column("timeline", sa.Text),
)

backoffs = sa.Table(
    "backoffs",
    metadata,
    sa.Column("function_id", sa.String(32), primary_key=True),
    sa.Column("app_id", sa.String(32), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("failures", sa.Integer, nullable=False),
    sa.Column("delay", sa.Float, nullable=False),
    sa.Column("until", sa.Float, nullable=False),
    sa.Column("reason", Words, nullable=False),
    sa.Column("message", Words),
    sa.Column("hint", Words, nullable=False),
    sa.Column("output", sa.LargeBinary),
)
"""Functions of deployed apps whose containers do not start; `message`, `hint` and `output` are for their callers."""

workspaces = sa.Table(
    "workspaces",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("created_at", sa.Float, nullable=False),
)

environments = sa.Table(
    "environments",
    metadata,
    sa.Column("workspace", sa.String(32), primary_key=True),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("created_at", sa.Float, nullable=False),
)

tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("token_id", sa.String(32), primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("workspace", sa.String(32), nullable=False),
    sa.Column("is_admin", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float),
    sa.Column("revoked_at", sa.Float),
    sa.Column("used_at", sa.Float),
    sa.Column("old_digest", sa.String(64)),
    sa.Column("old_until", sa.Float),
)

secrets = sa.Table(
    "secrets",
    metadata,
    sa.Column("workspace", sa.String(32), primary_key=True),
    sa.Column("environment", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("keys", sa.Text, nullable=False),
    sa.Column("box", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("updated_at", sa.Float, nullable=False),
)

schedules = sa.Table(
    "schedules",
    metadata,
    sa.Column("schedule_id", sa.String(32), primary_key=True),
    sa.Column("app_id", sa.String(32), nullable=False, index=True),
    sa.Column("tag", sa.String(256), nullable=False),
    sa.Column("method", sa.String(256), nullable=False),
    sa.Column("rule", sa.Text, nullable=False),
    sa.Column("began_at", sa.Float, nullable=False),
    sa.Column("last", sa.Float, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("paused", sa.Boolean, nullable=False),
    sa.Column("fired", sa.Integer, nullable=False),
    sa.Column("skipped", sa.Integer, nullable=False),
    sa.Column("running", sa.Text, nullable=False),
    sa.Column("recent", sa.Text, nullable=False),
)
"""Everything until `last` is fired or left out; `running` and `recent` are JSON lists of at most 10."""
