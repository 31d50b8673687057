"""What is sent back: whole, with digests, and with nothing private in it."""

import getpass
import hashlib
import json
import platform
import subprocess
import tarfile
from pathlib import Path

import pytest

from camera.device_check.archive import write_report
from camera.device_check.context import Line
from camera.device_check.privacy import Redactor
from camera.device_check.runner import check
from camera.device_check.schema import CheckReport
from camera.options import CheckOptions
from tests.camera.device_check.toy import toy

CPU = CheckOptions(device="cpu", tiny=True)


def test_the_archive_has_report_page_schema_logs_and_their_digests(tmp_path: Path) -> None:
    out = tmp_path / "found"
    report = check(CPU, out, steps=(toy("good", "print"), toy("bad", "miss")))
    archive = write_report(report, CPU, out)
    with tarfile.open(archive) as tar:
        assert {member.uname for member in tar.getmembers()} == {""}
        tar.extractall(tmp_path / "sent", filter="data")
    sent = tmp_path / "sent" / "npu-check"
    lines = (sent / "SHA256SUMS").read_text().splitlines()
    assert {line.split("  ")[1] for line in lines} == {
        *("report.json", "report.schema.json", "report.html", "logs/good.log", "logs/bad.log")
    }
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((sent / name).read_bytes()).hexdigest() == digest
    assert CheckReport.model_validate_json((sent / "report.json").read_text()).steps == report.steps
    assert json.loads((sent / "report.schema.json").read_text())["title"] == "CheckReport"
    log = (sent / "logs" / "good.log").read_text()
    assert "token *** in ~/models, OUT" in log
    page = (sent / "report.html").read_text()
    assert "error: 2 is more than 1" in page
    assert "Small shapes" in page


def test_a_redactor_hides_user_host_home_addresses_and_secrets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "lihua")
    monkeypatch.setattr(platform, "node", lambda: "node17.lab.example")
    monkeypatch.setenv("HOME", "/home/lihua")
    monkeypatch.setenv("SOME_API_KEY", "abcdef123456")
    model = tmp_path / "openpangu"
    model.mkdir()
    redact = Redactor(CheckOptions(model=model), Path("/data/lihua/check"))
    told = redact(
        f"lihua@node17: {model}/config.json /home/lihua/x /home/wang/y /data/lihua/check/logs key abcdef123456 "
        "tcp://10.1.2.3:29500 CANN 8.5.0.1 node17.lab.example"
    )
    assert told == ("USER@HOST: MODEL/config.json ~/x ~/y OUT/logs key *** tcp://***:29500 CANN 8.5.0.1 HOST")


@pytest.mark.parametrize(
    ("name", "told", "clean"),
    [
        ("alice", "/data/alice2 alice_env ALICE-box", "/data/USER2 USER_env USER-box"),
        (
            "max",
            "max: climax of maxima, MAX_1 in /data/max2",
            "USER: climax of maxima, USER_1 in /data/USER2",
        ),
        ("li", "li likes lists", "li likes lists"),
        ("root", "Root of root_x, chroot", "Root of root_x, chroot"),
    ],
)
def test_names_go_within_longer_words_and_in_any_case(
    monkeypatch: pytest.MonkeyPatch, name: str, told: str, clean: str
) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: name)
    assert Redactor(CPU, Path("/srv/out"))(told) == clean


def test_addresses_go_and_versions_stay() -> None:
    redact = Redactor(CPU, Path("/srv/out"))
    told = "HCCL_IF_IP=8.8.1.3 MASTER_ADDR=node1.lab 10.1.2.3, 192.168.0.7. CANN 8.5.0.1 driver 25.2.0.10"
    assert redact(told) == "HCCL_IF_IP=*** MASTER_ADDR=*** ***, ***. CANN 8.5.0.1 driver 25.2.0.10"
    environment = {"HCCL_IF_IP": "8.8.1.3", "cann": "8.5.0.1"}
    line = redact.result(Line(details={"environment": environment}))
    assert line.details == {"environment": {"HCCL_IF_IP": "***", "cann": "8.5.0.1"}}


def test_a_backslash_before_a_folder_breaks_nothing(tmp_path: Path) -> None:
    redact = Redactor(CPU, tmp_path)
    line = redact.result(Line(failure='"\\/home/bob": "x"\n/home/bob\\'))
    assert line.failure == '"\\~": "x"\n~'


def test_a_log_that_a_kill_left_as_printed_is_clean_in_the_archive(tmp_path: Path) -> None:
    out = tmp_path / "found"
    report = check(CPU, out, steps=(toy("good", "pass"),))
    (out / "logs" / "good.log").write_text("from 10.1.2.3, /home/bob/models")
    with tarfile.open(write_report(report, CPU, out)) as tar:
        log = tar.extractfile("npu-check/logs/good.log")
        assert log is not None
        assert log.read() == b"from ***, ~/models"


def test_the_digests_are_what_sha256sum_reads(tmp_path: Path) -> None:
    out = tmp_path / "found"
    write_report(check(CPU, out, steps=(toy("good", "pass"),)), CPU, out)
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=True)


def test_the_folder_one_stands_in_is_taken_and_logs_of_no_step_stay_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "found"
    out.mkdir()
    monkeypatch.chdir(out)
    report = check(CPU, Path(), steps=(toy("good", "pass"),))
    (out / "logs" / "mine.log").write_text("private")
    archive = write_report(report, CPU, Path())
    assert archive == tmp_path / "found.tar.gz"
    with tarfile.open(archive) as tar:
        assert [name for name in tar.getnames() if name.endswith(".log")] == ["npu-check/logs/good.log"]
