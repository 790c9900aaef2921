"""Read-only SQL over views that the configuration allows, and over nothing else.

Three walls stand one behind the other. The query is parsed (sqlglot) and refused unless it is one SELECT over
the allowed views with functions from a list; what runs is written anew from the parsed tree, with the views as
common table expressions bound to the caller's tenant. The connection is read-only (`query_only` and an
authorizer on SQLite, a read-only transaction on PostgreSQL). Time and rows are bounded by the database itself.
"""

import logging
import re
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import sqlglot
from sqlalchemy.engine import Connection, Engine
from sqlglot import exp

from cluster.errors import InputError, UnavailableError
from data.intake.plain import to_plain

log = logging.getLogger(__name__)

FUNCTIONS = frozenset(
    "abs avg cast ceil coalesce concat count countif date extract floor if ifnull length lower max min mod exists "
    "nullif power replace round sign substring sum trim upper rownumber rank denserank lag lead".split()
)
"""Functions a query may call, by sqlglot's names in lower case without underscores."""
REFUSED = (
    exp.Into, exp.Lock, exp.Command, exp.Parameter, exp.SessionParameter, exp.Anonymous, exp.AnonymousAggFunc,
    exp.Lateral, exp.Unnest, exp.TableSample, exp.Pragma, exp.DML, exp.DDL,
)  # fmt: skip
OWN = "own_with_"
"""Prefix of the names in a query's own WITH."""
BOUND = ("tenant", "workspace")
"""Parameters that only the server binds."""
MAX_QUERY_CHARS = 10_000
MARKED = re.compile("\0([A-Za-z_][A-Za-z0-9_]*)\0")
PROGRESS_STEPS = 10_000  # SQLite's virtual machine looks at the clock this often
READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}


@dataclass(frozen=True, slots=True)
class _Written:
    """SQL to run, and the names of its parameters."""

    text: str
    parameters: set[str]


@dataclass(frozen=True, slots=True)
class Rows:
    """What a query found."""

    columns: list[str]
    rows: list[list[Any]]
    truncated: bool
    """There were more rows than may come back."""


class ReadOnlySql:
    """Queries over `views`, each a SELECT that may use `:tenant` and `:workspace`."""

    def __init__(self, engine: Engine, views: Mapping[str, str], *, max_rows: int, timeout_s: float) -> None:
        self._engine, self._views = engine, dict(views)
        self._max_rows, self._timeout_s = max_rows, timeout_s
        self._dialect = "sqlite" if engine.dialect.name == "sqlite" else "postgres"
        parsed = [sqlglot.parse_one(view, read=self._dialect) for view in views.values()]
        self._tables = frozenset(table.name for view in parsed for table in view.find_all(exp.Table))

    @property
    def views(self) -> list[str]:
        """Names that a query may read."""
        return sorted(self._views)

    def run(self, query: str, parameters: Mapping[str, Any], tenant: str, workspace: str) -> Rows:
        """The rows of a query.

        Raises:
            InputError: the query is not allowed, the database refuses it, or it finds what is no text.
            UnavailableError: the database does not answer, or took too long.
        """
        if taken := sorted(set(parameters) & set(BOUND)):
            raise InputError(f"parameters.{taken[0]}", parameters[taken[0]], "is bound by the server", "leave it out")
        written = self._allowed(query)
        values = {**parameters, "tenant": tenant, "workspace": workspace}
        if missing := sorted(written.parameters - set(values)):
            raise InputError(f"parameters.{missing[0]}", None, "is missing", "give every :name of the query a value")
        try:
            connecting = self._engine.connect()
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            log.warning("the database of the views cannot be reached (%s)", error)
            raise UnavailableError("the database does not answer") from None
        try:
            with connecting as connection:
                return self._read(connection, written.text, {name: values[name] for name in written.parameters})
        except sa.exc.DBAPIError as error:
            cause = str(error.orig).splitlines()[0]
            if error.connection_invalidated:
                log.warning("the database of the views broke off (%s)", cause)
                raise UnavailableError("the database broke off") from None
            if "interrupted" in cause or "timeout" in cause:
                raise UnavailableError(f"the query took longer than {self._timeout_s:g} s") from None
            raise InputError("query", query, f"is refused by the database ({cause})", "mend the query") from None

    def _read(self, connection: Connection, statement: str, values: dict[str, Any]) -> Rows:
        locked = _lock_sqlite if self._dialect == "sqlite" else _lock_postgres
        unlock = locked(connection, self._timeout_s, self._tables)
        try:
            result = connection.exec_driver_sql(statement, values)
            found = result.fetchmany(self._max_rows + 1)
            names = list(result.keys())
            rows = [[to_plain(v, n) for n, v in zip(names, row, strict=True)] for row in found[: self._max_rows]]
            return Rows(names, rows, len(found) > self._max_rows)
        finally:
            unlock()

    def _allowed(self, query: str) -> "_Written":
        """The query written anew, with the views it reads in front.

        Raises:
            InputError: it is anything but one SELECT over the views.
        """
        if len(query) > MAX_QUERY_CHARS or "\0" in query:
            rule = f"must have at most {MAX_QUERY_CHARS} characters, none of them NUL"
            raise InputError("query", query, rule, "ask for less")
        try:
            trees = [tree for tree in sqlglot.parse(query, read=self._dialect) if tree is not None]
        except (sqlglot.errors.SqlglotError, RecursionError) as error:
            cause = str(error).splitlines()[0]
            raise InputError("query", query, f"cannot be parsed ({cause})", "send one SELECT") from None
        if len(trees) != 1 or not isinstance(trees[0], exp.Select | exp.SetOperation):
            raise InputError("query", query, "must be one SELECT", "send nothing else")
        tree = trees[0]
        self._check(tree, query)
        _rename_own(tree)
        used = sorted({t.name for t in tree.find_all(exp.Table)} & set(self._views))
        views = [(name, sqlglot.parse_one(self._views[name], read=self._dialect)) for name in used]
        parts = [f"{name} AS ({self._marked(view)})" for name, view in views]
        names = {p.name for _, view in views for p in view.find_all(exp.Placeholder)}
        names |= {p.name for p in tree.find_all(exp.Placeholder)}
        # A query's own WITH stays inside the parentheses, so nothing of it can stand in for a view.
        text = (f"WITH {', '.join(parts)} " if parts else "") + f"SELECT * FROM ({self._marked(tree)}) AS allowed"
        return _Written(self._bound(text), names)

    def _marked(self, tree: Any) -> str:
        """SQL with its parameters between NUL characters, which no query can hold."""

        def mark(node: Any) -> Any:
            return exp.Var(this=f"\0{node.name}\0") if isinstance(node, exp.Placeholder) else node

        return str(tree.transform(mark).sql(dialect=self._dialect, comments=False))

    def _bound(self, text: str) -> str:
        """The text with the driver's own parameters."""
        if self._dialect == "sqlite":
            return MARKED.sub(r":\1", text)
        return MARKED.sub(r"%(\1)s", text.replace("%", "%%"))

    def _check(self, tree: exp.Expression, query: str) -> None:
        own = {cte.alias for cte in tree.find_all(exp.CTE)}
        if shadowed := own & set(self._views):
            raise InputError("query", query, f"names its own {min(shadowed)}", "give it another name")
        for node in tree.walk():
            if isinstance(node, REFUSED):
                raise InputError("query", query, f"uses {node.sql()!r:.80}, which is not allowed", "use plain SELECT")
            if isinstance(node, exp.Placeholder) and not node.name.isidentifier():
                raise InputError("query", query, "has a parameter without a name", "write :name")
            if isinstance(node, exp.With) and node.args.get("recursive"):
                raise InputError("query", query, "uses WITH RECURSIVE", "use plain SELECT")
            if isinstance(node, exp.Table):
                self._check_table(node, own, query)
            elif isinstance(node, exp.Func) and not isinstance(node, exp.Connector | exp.Case | exp.If):
                name = type(node).__name__.lower()
                if name not in FUNCTIONS:
                    known = ", ".join(sorted(FUNCTIONS))
                    raise InputError("query", query, f"calls {name}, which is not among {known}", "leave it out")

    def _check_table(self, node: exp.Table, own: set[str], query: str) -> None:
        if node.db or node.catalog or not isinstance(node.this, exp.Identifier):
            raise InputError("query", query, f"names {node.sql()!r:.80}", f"read from {', '.join(self.views)}")
        if node.name not in own and node.name not in self._views:
            known = ", ".join(self.views) or "none"
            raise InputError("query", query, f"reads {node.name!r}, which is no view here", f"known views: {known}")


def _rename_own(tree: Any) -> None:
    """Give the query's own WITH names that no table has.

    Outside its scope such a name would mean the table of that name: in an earlier WITH, or beside a subquery.
    """
    own = {cte.alias for cte in tree.find_all(exp.CTE)}
    for table in list(tree.find_all(exp.Table)):
        if table.name in own:
            if not table.alias:
                table.set("alias", exp.TableAlias(this=exp.to_identifier(table.name)))
            table.set("this", exp.to_identifier(f"{OWN}{table.name}"))
    for cte in tree.find_all(exp.CTE):
        cte.args["alias"].set("this", exp.to_identifier(f"{OWN}{cte.alias}"))


def _lock_sqlite(connection: Connection, timeout_s: float, tables: frozenset[str]) -> Any:
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    end = time.monotonic() + timeout_s
    connection.exec_driver_sql("PRAGMA query_only=ON")

    def authorise(action: int, name: str | None, column: str | None, *_details: Any) -> int:
        if action == sqlite3.SQLITE_READ and column and name not in tables:  # no column: rows are counted
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK if action in READS else sqlite3.SQLITE_DENY

    def unlock() -> None:
        driver.set_authorizer(None)
        driver.set_progress_handler(None, 0)
        connection.exec_driver_sql("PRAGMA query_only=OFF")

    driver.set_progress_handler(lambda: time.monotonic() > end, PROGRESS_STEPS)
    driver.set_authorizer(authorise)
    return unlock


def _lock_postgres(connection: Connection, timeout_s: float, _tables: frozenset[str]) -> Any:
    connection.exec_driver_sql("SET TRANSACTION READ ONLY")
    connection.exec_driver_sql(f"SET LOCAL statement_timeout = {round(timeout_s * 1000)}")
    return lambda: None
