"""The real torch_npu on a stub of CANN: docs/ascend-stub.md."""

from pathlib import Path

import pytest

from tests.npu.process import OnNpu
from tests.npu.stub import build, wheel


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("npu")


@pytest.fixture(scope="session")
def stub() -> Path:
    """The root of the stub of CANN, built or taken from the cache."""
    if reason := build.why_not():
        pytest.skip(reason)
    if not wheel.unpacked().exists():
        pytest.skip(f"the wheel of torch_npu {wheel.VERSION} is not at hand: `make test-npu` fetches it")
    return build.build(wheel.unpacked(), wheel.CACHE)


@pytest.fixture(scope="session")
def on_npu(stub: Path, tmp_path_factory: pytest.TempPathFactory) -> OnNpu:
    """Runs code or a command in a process whose NPU is the stub."""
    return OnNpu(wheel.unpacked(), stub, tmp_path_factory.mktemp("npu"))
