"""The few calls of Google's storage client that Ray Data makes: one session of two streams of rows.

The second stream gives the rows of the Parquet file that `FAKE_BIGQUERY_ROWS` names, where it names one.
"""

import os

import pyarrow as pa
import pyarrow.parquet as pq

from . import types as types


class _Named:
    def __init__(self, **fields):
        self.__dict__.update(fields)


class BigQueryReadClient:
    def __init__(self, client_info=None):
        pass

    def create_read_session(self, parent, read_session, max_stream_count):
        assert (parent, read_session.table) == ("projects/proj", "projects/proj/datasets/logs/tables/feedback")
        return _Named(streams=[_Named(name="0"), _Named(name="1")])

    def read_rows(self, name):
        if name == "1" and (file := os.environ.get("FAKE_BIGQUERY_ROWS")):
            return _Named(to_arrow=lambda: pq.read_table(file))
        rows = [
            {
                "kind": "feedback",
                "event_id": f"s{name}-{number}",
                "interaction_id": f"i{number}",
                "type": "meh" if (name, number) == ("1", 7) else "thumbs_up",
            }
            for number in range(20)
        ]
        return _Named(to_arrow=lambda: pa.Table.from_pylist(rows))
