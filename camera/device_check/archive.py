"""What is sent back: the report, its schema, logs and digests in one file, in which no path or name is private."""

import hashlib
import io
import tarfile
from pathlib import Path

from camera.device_check.page import render_page
from camera.device_check.privacy import Redactor
from camera.device_check.schema import CheckReport
from camera.files import atomic_file, write_json
from camera.options import CheckOptions

REPORT, SCHEMA, PAGE, DIGESTS = "report.json", "report.schema.json", "report.html", "SHA256SUMS"


def write_report(report: CheckReport, options: CheckOptions, out: Path) -> Path:
    """Write the report and the page into a folder, and the archive beside it.

    Returns:
        The archive, `NAME.tar.gz`: the report, its schema, the page, a log for each step, and the sha256 of all of them, in
        the form that `sha256sum --check` reads.
    """
    out = out.resolve()
    redact = Redactor(options, out)
    clean = redact.result(report)
    write_json(out / REPORT, clean.model_dump(mode="json"))
    write_json(out / SCHEMA, CheckReport.model_json_schema())
    _write(out / PAGE, render_page(clean))
    ran = [f"logs/{step.name}.log" for step in report.steps if step.verdict != "skipped"]
    logs = [name for name in ran if (out / name).is_file()]
    for name in logs:  # again: a kill after a step leaves its log as it was printed
        _write(out / name, redact((out / name).read_text(encoding="utf-8", errors="replace")))
    names = [REPORT, SCHEMA, PAGE, *logs]
    digests = [f"{hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    _write(out / DIGESTS, "".join(digests))
    archive = out.with_name(f"{out.name}.tar.gz")
    with atomic_file(archive) as temporary, tarfile.open(temporary, "w:gz") as tar:
        for name in (*names, DIGESTS):
            content = (out / name).read_bytes()
            member = tarfile.TarInfo(f"npu-check/{name}")  # without the owner's name, and the same each time
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
