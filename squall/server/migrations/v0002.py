"""From the first release to the one with deployed apps, durable calls, schedules and tokens.

Not released yet: add to it what you add to `tables.py`, a function for each part of the server.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

LARGE = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """The parts, each in a function of its own, in an order that leaves every row valid."""
    _namespaces()
    _deployed_apps()
    _apps()
    _calls()
    _inputs()
    _schedules()
    _backoffs()


def _deployed_apps() -> None:
    op.add_column("apps", sa.Column("workspace", sa.String(32), nullable=False, server_default="main"))
    op.add_column("apps", sa.Column("environment", sa.String(64), nullable=False, server_default="main"))
    op.add_column("apps", sa.Column("deployed", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("apps", sa.Column("version", sa.Integer, nullable=False, server_default="0"))
    op.add_column("apps", sa.Column("labels", sa.Text))
    op.add_column("functions", sa.Column("root_id", sa.String(32)))
    op.add_column("functions", sa.Column("box", sa.LargeBinary))
    op.add_column("functions", sa.Column("override", sa.Text))
    op.create_table(
        "versions",
        sa.Column("app_id", sa.String(32), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("facts", sa.Text, nullable=False),
        sa.Column("box", sa.LargeBinary),
    )


def _namespaces() -> None:
    op.create_table(
        "workspaces",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    op.create_table(
        "environments",
        sa.Column("workspace", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    op.create_table(
        "tokens",
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
    op.create_table(
        "secrets",
        sa.Column("workspace", sa.String(32), primary_key=True),
        sa.Column("environment", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("keys", sa.Text, nullable=False),
        sa.Column("box", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("updated_at", sa.Float, nullable=False),
    )


def _apps() -> None:
    op.create_table(
        "kept_apps",
        sa.Column("app_id", sa.String(32), primary_key=True),
        sa.Column("workspace", sa.String(32), nullable=False),
        sa.Column("environment", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("box", sa.LargeBinary, nullable=False),
    )


def _calls() -> None:
    op.add_column("calls", sa.Column("workspace", sa.String(32), nullable=False, server_default="main"))
    op.add_column("calls", sa.Column("method", sa.String(256), nullable=False, server_default=""))
    op.add_column("calls", sa.Column("parent", sa.String(80)))
    op.add_column("calls", sa.Column("cancelled_at", sa.Float))
    op.add_column("calls", sa.Column("cancel_reason", sa.Text))
    op.create_index("ix_calls_parent", "calls", ["parent"])
    op.create_table(
        "keys",
        sa.Column("function_id", sa.String(32), primary_key=True),
        sa.Column("key", sa.String(256), primary_key=True),
        sa.Column("call_id", sa.String(32), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False, index=True),
    )


def _inputs() -> None:
    """Inputs get a number in the order in which they came, so the table is made anew."""
    op.rename_table("inputs", "inputs_v1")
    op.create_table(
        "inputs",
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
        sa.Column("message", sa.Text),
        sa.Column("hint", sa.Text),
        sa.Column("finished_at", sa.Float),
        sa.UniqueConstraint("call_id", "idx", name="uq_inputs_of_call"),
    )
    unfinished = sa.text("status IS NULL")
    op.create_index("ix_inputs_unfinished", "inputs", ["seq"], sqlite_where=unfinished, postgresql_where=unfinished)
    kept, expired = sa.text("status IS NOT NULL AND status <> 'expired'"), sa.text("status = 'expired'")
    op.create_index("ix_inputs_kept", "inputs", ["finished_at"], sqlite_where=kept, postgresql_where=kept)
    op.create_index("ix_inputs_expired", "inputs", ["finished_at"], sqlite_where=expired, postgresql_where=expired)
    same = "call_id, idx, args, args_blob, status, result, result_blob, message, hint, finished_at"
    told = ", ".join(f"i.{name}" for name in same.split(", "))
    op.execute(
        f"INSERT INTO inputs (seq, {same}) SELECT row_number() OVER (ORDER BY c.created_at, i.call_id, i.idx), {told} "
        "FROM inputs_v1 i JOIN calls c ON c.call_id = i.call_id"
    )
    op.drop_table("inputs_v1")


def _schedules() -> None:
    op.create_table(
        "schedules",
        sa.Column("schedule_id", sa.String(32), primary_key=True),
        sa.Column("app_id", sa.String(32), nullable=False),
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
    op.create_index("ix_schedules_app_id", "schedules", ["app_id"])


def _backoffs() -> None:
    op.create_table(
        "backoffs",
        sa.Column("function_id", sa.String(32), primary_key=True),
        sa.Column("app_id", sa.String(32), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("failures", sa.Integer, nullable=False),
        sa.Column("delay", sa.Float, nullable=False),
        sa.Column("until", sa.Float, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("message", sa.Text),
        sa.Column("hint", sa.Text, nullable=False),
        sa.Column("output", sa.LargeBinary),
    )
