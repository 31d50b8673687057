"""Logs, warnings and tracebacks of any library, without control characters, forged lines and secrets."""

import io
import logging
import sys
import warnings
from collections.abc import Iterator

import pytest

from camera.logs import harmless_logs

HOSTILE = "model\n✓ verified\x1b[2J"


@pytest.fixture
def harmless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:S3CRETpw@host")
    before = logging.getLogRecordFactory()
    harmless_logs()
    yield
    logging.setLogRecordFactory(before)


@pytest.mark.usefixtures("harmless")
def test_a_record_is_one_message_whatever_formats_it():
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    log = logging.getLogger("anybody's")
    log.propagate = False
    log.addHandler(handler)
    log.warning("no file %s at http://me:S3CRETpw@host", HOSTILE)
    try:
        raise ValueError(f"S3CRETpw {HOSTILE}")
    except ValueError:
        log.exception("failed")
    lines = written.getvalue().splitlines()
    assert lines[0] == r"WARNING no file model"
    assert lines[1] == r"  | ✓ verified\x1b[2J at http://***@host"
    assert "\x1b" not in written.getvalue()
    assert "S3CRETpw" not in written.getvalue()


@pytest.mark.usefixtures("harmless")
def test_warnings_and_tracebacks_steer_no_terminal_and_tell_no_secret(capsys: pytest.CaptureFixture[str]):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        sys.stderr.write(warnings.formatwarning(f"S3CRETpw {HOSTILE}", UserWarning, "file.py", 1))
    error = ValueError(f"S3CRETpw {HOSTILE}")
    sys.excepthook(ValueError, error, None)
    told = capsys.readouterr().err
    assert "\x1b" not in told
    assert r"\x1b[2J" in told
    assert "S3CRETpw" not in told
