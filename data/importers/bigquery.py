"""Rows of BigQuery, read in parallel through Ray Data (the `bigquery` extra holds Google's clients)."""

from collections.abc import Iterator

from cluster.errors import InputError, UnavailableError
from cluster.runtime import ray_session
from cluster.settings import Settings
from data.importers.source import Source
from data.rows import Row, plain_row


def bigquery_source(project: str, table: str | None, query: str | None, settings: Settings) -> Source:
    """A table (`dataset.table`) or query of a project. `InputError` where neither is given."""
    if not project:
        raise InputError("source", "bigquery://", "names no project", "write bigquery://PROJECT")
    if query is None and (table is None or table.count(".") != 1):
        raise InputError("table", table, "must be DATASET.TABLE", "give --table DATASET.TABLE or --query")
    return Source(table or "query", lambda: _rows(project, table, query, settings), lambda: 0)


def _rows(project: str, table: str | None, query: str | None, settings: Settings) -> Iterator[Row]:
    try:
        from google.cloud import bigquery, bigquery_storage  # noqa: F401
    except ImportError:
        remedy = 'install them: pip install -e ".[bigquery]"'
        raise InputError("source", f"bigquery://{project}", "needs Google's clients", remedy) from None
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    with ray_session(settings):
        import ray.data

        try:
            found = ray.data.read_bigquery(project, dataset=table, query=query)
            for number, row in enumerate(found.iter_rows(), 1):
                yield plain_row(number, row)
        except ValueError as error:  # Ray's word for a table that is not there
            raise InputError("table", table, str(error).splitlines()[0], "name an existing table") from None
        except (GoogleAPIError, GoogleAuthError) as error:
            cause = str(error).splitlines()[0]
            raise UnavailableError(f"BigQuery project {project} does not answer ({cause})") from None
