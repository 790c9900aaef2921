"""Alembic's entry: runs the migrations on the connection it is handed."""

from alembic import context

from cluster.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
context.run_migrations()
