"""From the first release to the one with deployed apps, durable calls, schedules and tokens.

Not released yet: add to it what you add to `tables.py`, a function for each part of the server.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op


def upgrade() -> None:
    """The parts, each in a function of its own, in an order that leaves every row valid."""
    _namespaces()
    _deployed_apps()


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
