"""The first schema."""

from alembic import op

from cluster.tables import metadata

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create every table of the first release."""
    metadata.create_all(op.get_bind(), checkfirst=False)


def downgrade() -> None:
    """Drop them again."""
    metadata.drop_all(op.get_bind())
