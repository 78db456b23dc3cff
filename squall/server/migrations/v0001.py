"""The schema of the first release."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

LARGE = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "meta",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.create_table(
        "apps",
        sa.Column("app_id", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(64), nullable=False, index=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("detached", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("stopped_at", sa.Float),
        sa.Column("reason", sa.Text),
    )
    op.create_table(
        "functions",
        sa.Column("function_id", sa.String(32), primary_key=True),
        sa.Column("app_id", sa.String(32), nullable=False, index=True),
        sa.Column("tag", sa.String(256), nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
    )
    op.create_table(
        "calls",
        sa.Column("call_id", sa.String(32), primary_key=True),
        sa.Column("function_id", sa.String(32), nullable=False, index=True),
        sa.Column("app_id", sa.String(32), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False, index=True),
    )
    _inputs_and_containers()


def _inputs_and_containers() -> None:
    op.create_table(
        "inputs",
        sa.Column("call_id", sa.String(32), primary_key=True),
        sa.Column("idx", sa.Integer, primary_key=True),
        sa.Column("args", sa.LargeBinary),
        sa.Column("args_blob", sa.String(64)),
        sa.Column("status", sa.String(16)),
        sa.Column("result", sa.LargeBinary),
        sa.Column("result_blob", sa.String(64)),
        sa.Column("message", sa.Text),
        sa.Column("hint", sa.Text),
        sa.Column("finished_at", sa.Float),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "containers",
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
        sa.Column("reason", sa.Text),
        sa.Column("cpu_seconds", sa.Float),
        sa.Column("memory_peak_bytes", LARGE),
        sa.Column("timeline", sa.Text),
    )
