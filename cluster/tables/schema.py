"""What all tables stand on: one schema, and the type of sequence numbers."""

from sqlalchemy import BigInteger, Integer, MetaData

metadata = MetaData()
Sequence64 = BigInteger().with_variant(Integer, "sqlite")  # SQLite's rowid alias must be INTEGER
