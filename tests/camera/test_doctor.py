import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from camera.ascend import causes
from camera.ascend.host import HELPFUL, HostFacts, parse_smi
from camera.doctor import Finding, diagnose, installed_packages
from tests.camera.ascend.npu_smi import NARROW

REPOSITORY = Path(__file__).parents[2]


def found(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


def test_versions_are_those_installed() -> None:
    findings = diagnose() + installed_packages(["prefect"])
    for package in ("torch", "transformers", "gguf", "prefect"):
        assert found(findings, package).detail == importlib.metadata.version(package)
        assert found(findings, package).status == "ok"


def test_the_cpu_and_memory_are_always_there() -> None:
    findings = diagnose()
    assert found(findings, "cpu").status == "ok"
    assert "GiB" in found(findings, "host").detail


def test_what_is_missing_comes_with_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    for finding in diagnose():
        assert finding.status == "ok" or finding.advice, finding
    assert found(diagnose(), "llama.cpp").status == "warn"


def test_an_npu_that_works_is_named(npu: object) -> None:
    assert found(diagnose(), "npu").detail.startswith("Ascend910B1, 64.0 GiB")


def test_a_package_that_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without_gguf(name: str) -> str:
        if name == "gguf":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_gguf)
    assert found(diagnose(), "gguf").status == "missing"


SCRIPT = """
import sys
from camera.doctor import diagnose
for finding in diagnose():
    sys.stdout.write(f"{finding.name}|{finding.status}|{finding.detail}|{finding.advice}\\n")
sys.stdout.write("imported: " + " ".join(name for name in ("prefect", "mlflow", "dvc") if name in sys.modules))
"""


def run_doctor(extra: Path, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": f"{extra}{os.pathsep}{REPOSITORY}", **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.fixture
def torch_npu_without_cann(tmp_path: Path) -> Path:
    """A torch_npu that is installed, announces itself to torch, and cannot find CANN's libraries."""
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    information = tmp_path / "torch_npu-2.13.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.13.0\n")
    (information / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return tmp_path


def test_an_npu_backend_that_takes_torch_down_is_diagnosed(torch_npu_without_cann: Path) -> None:
    output = run_doctor(torch_npu_without_cann)
    line = next(line for line in output.splitlines() if line.startswith("torch|missing"))
    assert "libhccl.so" in line
    assert "set_env.sh" in line
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0 is not enough" in line
    assert "pairing|warn|torch 2.13" in output


def test_without_autoload_torch_works_and_the_npu_says_why_not(torch_npu_without_cann: Path) -> None:
    output = run_doctor(torch_npu_without_cann, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "cpu|ok" in output
    line = next(line for line in output.splitlines() if line.startswith("npu|missing"))
    assert "libhccl.so" in line
    assert "set_env.sh" in line
    assert output.endswith("imported: ")


@pytest.mark.parametrize("command", [("doctor",), ("doctor", "--json"), ("imatrix", "no-model", "out")])
def test_every_command_names_the_cause_where_torch_cannot_be_imported(
    torch_npu_without_cann: Path, command: tuple[str, ...]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "camera", *command],
        env={
            **os.environ,
            "PYTHONPATH": f"{torch_npu_without_cann}{os.pathsep}{REPOSITORY}",
            "COLUMNS": "80",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if "--json" in command:
        statuses = {(one["section"], one["name"]): one["status"] for one in json.loads(done.stdout)}
        assert statuses["devices", "torch"] == "missing"
    else:
        assert "libhccl.so: cannot open" in (done.stdout + done.stderr).replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert done.returncode == (1 if "doctor" in command else 2)


def ascend_host(**changed: object) -> HostFacts:
    """An Ascend host on which all is well, but for what is changed."""
    well = {
        "architecture": "aarch64",
        "soc": "Ascend910B2",
        "cann": "9.1.0",
        "driver": "25.5.2",
        "firmware": "7.8.0",
        "torch": "2.10.0+cpu",
        "torch_npu": "2.10.0.post4",
        "unpaired": None,
        "environment": HELPFUL,
        "cards": parse_smi(NARROW)[:1],
        "npu_smi": None,
        "internal_formats": False,
        "graphs": True,
    }
    return HostFacts.model_validate({**well, **changed})


def of_ascend(monkeypatch: pytest.MonkeyPatch, host: HostFacts) -> dict[str, Finding]:
    """What doctor says of an Ascend host, by name."""
    monkeypatch.setattr("camera.doctor.facts", lambda **given: host)
    monkeypatch.setattr("camera.ascend.causes.CANN_MODULES", {})
    return {finding.name: finding for finding in diagnose() if finding.section == "ascend"}


def test_an_ascend_host_that_is_well_gets_no_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = of_ascend(monkeypatch, ascend_host())
    assert {name: finding.advice for name, finding in findings.items() if finding.advice} == {}
    assert findings["pairing"].detail == "torch 2.10.0+cpu, torch_npu 2.10.0.post4, CANN 9.1.0"
    assert findings["driver"].detail == "25.5.2, firmware 7.8.0"
    assert findings["npu:0"].detail == "910B2, 3.3 GiB of 64.0 GiB in use, health OK"
    assert findings["graphs"].detail == "NPUGraph is there"


@pytest.mark.parametrize(
    ("changed", "name", "advice"),
    [
        ({"unpaired": "CANN 9.0.0 is paired with others"}, "pairing", "CANN 9.0.0 is paired with others"),
        ({"cann": None}, "pairing", "source CANN's set_env.sh"),
        ({"driver": None}, "driver", "mount the host's /usr/local/Ascend/driver"),
        ({"cards": parse_smi(NARROW)}, "npu:1", "take another card: --device npu:N"),
        (
            {"cards": (), "npu_smi": "npu-smi shows no card: dcmi module initialize failed"},
            "cards",
            "HwHiAiUser",
        ),
        (
            {"environment": {**HELPFUL, "ASCEND_LAUNCH_BLOCKING": "1"}},
            "settings",
            "unset ASCEND_LAUNCH_BLOCKING",
        ),
        ({"environment": {"TASK_QUEUE_ENABLE": "1"}}, "settings", "try CPU_AFFINITY_CONF=2 PYTORCH_NPU"),
    ],
)
def test_what_is_wrong_on_an_ascend_host_comes_with_advice(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, object], name: str, advice: str
) -> None:
    finding = of_ascend(monkeypatch, ascend_host(**changed))[name]
    assert finding.status == "warn"
    assert advice in finding.advice


def test_modules_that_cann_needs_and_a_cuda_build_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("camera.doctor.facts", lambda **given: ascend_host())
    monkeypatch.setitem(causes.CANN_MODULES, "no_such_module", "no-such-package")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    findings = {finding.name: finding for finding in diagnose() if finding.section == "ascend"}
    assert "no-such-package" in findings["modules"].advice
    assert findings["torch"].detail == "a build for CUDA 13.0"
    assert "install a CPU build" in findings["torch"].advice


def test_a_host_without_anything_of_ascend_has_no_such_section() -> None:
    assert not [finding for finding in diagnose() if finding.section == "ascend"]
