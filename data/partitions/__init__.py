"""Sealed partitions: days of the log as Parquet files that prove themselves."""
