import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from camera.doctor import Finding, diagnose, installed_packages

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
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in line
    assert "set_env.sh" in line


def test_without_autoload_torch_works_and_the_npu_says_why_not(torch_npu_without_cann: Path) -> None:
    output = run_doctor(torch_npu_without_cann, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "cpu|ok" in output
    line = next(line for line in output.splitlines() if line.startswith("npu|"))
    assert "libhccl.so" in line
    assert "set_env.sh" in line
    assert output.endswith("imported: ")
