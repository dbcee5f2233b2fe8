"""Alembic's entry: runs on the connection, and in the transaction, that `database.migrate` opened."""

from alembic import context

from tinkercloud.ledger.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
context.run_migrations()
