"""MLflow's SQLite database while another process writes to it: waited for, with a word, and a signal is obeyed meanwhile.

SQLite itself waits inside one call, where no signal is heard; MLflow has it wait 20 s there. So each call waits a second,
and is made again from here.
"""

import logging
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

from camera import shutdown

Answer = TypeVar("Answer")
_log = logging.getLogger("camera.tracking")
_CALL_SECONDS = 1.0
_BUSY_SECONDS = 60.0
_LOCKED = "database is locked"
"""SQLite's words, which MLflow passes on in errors of its own."""


def is_busy(error: BaseException) -> bool:
    """Whether an error, MLflow's own or SQLite's, says that another process holds the database."""
    return _LOCKED in str(error)


def patiently(act: Callable[[], Answer]) -> Answer:
    """Do something with a database, again and again for a minute while another process holds it.

    Raises:
        sqlite3.OperationalError: if it is held longer, or the error is another.
    """
    started = time.monotonic()
    said = False
    while True:
        try:
            return act()
        except sqlite3.OperationalError as error:
            if not is_busy(error) or time.monotonic() - started > _BUSY_SECONDS:
                raise
        if not said:
            _log.warning("waiting for another process that writes to MLflow's database")
            said = True
        shutdown.check()
        time.sleep(0.05)


@cache
def wait_for_busy_databases() -> None:
    """Have every statement and commit that SQLAlchemy sends to SQLite in this process wait so; done once."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    logging.getLogger("mlflow.store.db.utils").setLevel(
        logging.CRITICAL
    )  # prints a traceback of what we say in words

    @event.listens_for(Engine, "do_connect")
    def connecting(dialect: Any, record: Any, arguments: Any, named: dict[str, Any]) -> None:
        if dialect.driver == "pysqlite":
            named.setdefault("timeout", _CALL_SECONDS)

    @event.listens_for(Engine, "do_execute")
    def executing(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        if not isinstance(cursor, sqlite3.Cursor):
            return False
        if statement.startswith("PRAGMA busy_timeout"):
            statement = f"PRAGMA busy_timeout = {int(_CALL_SECONDS * 1000)}"
        patiently(lambda: cursor.execute(statement, parameters))
        return True

    @event.listens_for(Engine, "do_executemany")
    def executing_many(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        if not isinstance(cursor, sqlite3.Cursor):
            return False
        patiently(lambda: cursor.executemany(statement, parameters))
        return True

    @event.listens_for(Engine, "commit")
    def committing(connection: Any) -> None:
        # Who reads lets others write, and not commit. SQLAlchemy commits after this, or gets the error once more.
        database = connection.connection.dbapi_connection
        if isinstance(database, sqlite3.Connection):
            with suppress(sqlite3.OperationalError):
                patiently(database.commit)
