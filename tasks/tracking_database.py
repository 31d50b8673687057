"""The SQLite file that MLflow records in where there is no server: made whole, or not there."""

import os
import sqlite3
from pathlib import Path

from camera.files import held, whole_file


def database_of(uri: str) -> Path | None:
    """The file of a tracking address; None if that is no SQLite database."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def ready_database(path: Path) -> None:
    """See that the database can be opened, and make it if it is not there.

    MLflow makes some forty tables one by one, and never goes on with a database in which a kill left half of them. So
    they are made under another name, and one process makes them.

    Raises:
        OSError: if it cannot be opened or made (MLflow itself would try for 100 s).
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")
    if path.exists():
        _check(path)
        return
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"the folder {path.parent} cannot be written to")
    with held(path, wait=True):
        if not path.exists():
            with whole_file(path) as temporary:
                _make(temporary)


def _make(path: Path) -> None:
    from mlflow.tracking import MlflowClient  # 2.5 s; only who tracks or asks pays it

    MlflowClient(f"sqlite:///{path}").search_experiments(max_results=1)  # the first question makes the tables


def _check(path: Path) -> None:
    try:
        database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            database.execute("PRAGMA schema_version").fetchone()
        finally:
            database.close()
    except sqlite3.Error as error:
        raise OSError(f"{path}: {error}") from None
