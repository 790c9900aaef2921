"""Which source of rows a text names: a file, a table or query of a SQL database, BigQuery, or MLflow's traces.

The text is a path; a SQLAlchemy URL (`postgresql+psycopg://host/shop`, `sqlite:///x.db`);
`bigquery://project`; or `mlflow:experiment`. Reading starts when its rows are asked for.
"""

from pathlib import Path

from cluster.errors import InputError
from cluster.settings import Settings
from data.importers.source import Source, file_source

MLFLOW, BIGQUERY = "mlflow:", "bigquery://"


def open_sources(text: str, settings: Settings, *, table: str | None = None, query: str | None = None) -> list[Source]:
    """The sources that a text names: of a database without `table` or `query`, all its tables.

    Raises:
        InputError: nothing has that name.
        UnavailableError: the server does not answer.
    """
    if table is not None and query is not None:
        raise InputError("query", query, "does not go with a table", "give --table or --query")
    if text.startswith(BIGQUERY):
        from data.importers.bigquery import bigquery_source

        return [bigquery_source(text.removeprefix(BIGQUERY), table, query, settings)]
    if "://" in text:
        from data.importers.sql import sql_sources

        return sql_sources(text, table, query)
    if table is not None or query is not None:
        raise InputError("source", text, "has no tables", "give a database's URL, or leave out --table and --query")
    if text.startswith(MLFLOW):
        from data.importers.mlflow_traces import mlflow_source

        return [mlflow_source(text.removeprefix(MLFLOW), settings)]
    return [file_source(Path(text))]


def open_source(text: str, settings: Settings, *, table: str | None = None, query: str | None = None) -> Source:
    """The one source that a text names.

    Raises:
        InputError: nothing has that name, or more than one thing has.
        UnavailableError: the server does not answer.
    """
    found = open_sources(text, settings, table=table, query=query)
    if len(found) != 1:
        names = ", ".join(source.name for source in found) or "none"
        raise InputError("table", None, f"must be given; there are: {names}", "give --table or --query")
    return found[0]
