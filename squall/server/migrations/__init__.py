"""The steps from one schema of the Store to the next, one module a version: `v0001` makes an empty database that of the
first release, `v0002` makes that one today's. A step is never changed once a release has it.

`squall/server/tables.py` is the truth; a fresh Store is made from it, without Alembic. To change the schema:

1. Change `tables.py`.
2. Say the same with Alembic's operations in `upgrade` of the newest step, when no release has it yet:
   `op.create_table`, `op.add_column`, `op.create_index`. What a release has gets a new step, and `SCHEMA_VERSION` in
   `schema.py` one more.
3. New columns of old tables are nullable or have a `server_default`: old rows must be valid. Anything else on an old
   column goes into `with op.batch_alter_table("calls") as table:`, which SQLite needs.
4. No module of ours may be imported by a step: tables change, steps do not. Data is changed with `op.execute` and plain
   SQL that SQLite and PostgreSQL both understand.
5. `tests/contract/test_migrations.py` compares both ways to the schema, from nothing and from a database of the first
   release with data, and says what differs.

A step runs in the transaction of the opening: it is done whole or not at all, and the version row with it. There are no
steps down: an older release refuses the Store, a backup is the way back (`docs/guide/operating.md`).
"""
