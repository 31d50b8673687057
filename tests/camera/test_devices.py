import importlib.machinery
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from camera import devices
from camera.errors import CameraError


def test_auto_is_the_npu_where_there_is_one(npu: types.ModuleType) -> None:
    assert devices.resolve_device("auto") == torch.device("npu", 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_auto_is_the_cpu_where_there_is_nothing_else() -> None:
    assert devices.resolve_device("auto") == torch.device("cpu")


def test_a_name_that_is_no_device_is_refused() -> None:
    for name in ("tpu", "cuda:x", "cpu:1", "NPU", ""):
        with pytest.raises(CameraError, match="is none of auto, cpu"):
            devices.resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_refused_with_its_cause() -> None:
    with pytest.raises(CameraError, match=r"cuda:1 cannot be used: torch .*(CUDA|GPU)"):
        devices.resolve_device("cuda:1")


def test_a_missing_npu_says_what_to_install() -> None:
    with pytest.raises(CameraError, match="torch_npu is not installed: install the extra `npu`"):
        devices.resolve_device("npu")


def test_an_npu_without_cann_names_the_cause_and_what_does_not_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch_npu.py").write_text(
        "raise ImportError('libhccl.so: cannot open shared object file')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        CameraError, match=r"set_env\.sh.*TORCH_DEVICE_BACKEND_AUTOLOAD=0 is not enough.*libhccl\.so"
    ):
        devices.resolve_device("npu")
    assert devices.resolve_device("auto").type != "npu"


def test_an_npu_number_beyond_the_last_is_refused(npu: types.ModuleType) -> None:
    with pytest.raises(CameraError, match="npu:3 does not exist: this machine has 1 npu"):
        devices.resolve_device("npu:3")


def test_the_cards_of_a_run_begin_at_the_named_one(
    npu: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.get_device_module("npu"), "device_count", lambda: 4)
    assert devices.devices_of("npu:1", 2) == (torch.device("npu:1"), torch.device("npu:2"))
    assert devices.devices_of("auto", 2) == (torch.device("npu:0"), torch.device("npu:1"))
    assert devices.devices_of("cpu", 2) == (torch.device("cpu"), torch.device("cpu"))


def test_a_run_that_goes_past_the_last_card_is_refused(
    npu: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.get_device_module("npu"), "device_count", lambda: 4)
    told = "devices: 3 from npu:2 on are up to npu:4, which does not exist: .* begin at a lower number or use fewer"
    with pytest.raises(CameraError, match=told):
        devices.devices_of("npu:2", 3)


def test_only_the_card_that_is_to_compute_is_made_current(
    npu: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[torch.device] = []
    monkeypatch.setattr(torch.get_device_module("npu"), "device_count", lambda: 4)
    monkeypatch.setattr(torch.get_device_module("npu"), "set_device", used.append)
    devices.find_device("npu:2")
    devices.devices_of("npu:2", 2)
    assert used == []
    devices.resolve_device("npu:3")
    assert used == [torch.device("npu:3")]


def test_a_driver_that_finds_no_npu_is_told_apart(
    npu: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.get_device_module("npu"), "is_available", lambda: False)
    with pytest.raises(CameraError, match=r"finds no NPU.*npu-smi"):
        devices.resolve_device("npu")


def test_torch_npu_is_not_imported_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = types.ModuleType("torch_npu")
    broken.__spec__ = importlib.machinery.ModuleSpec("torch_npu", loader=None)
    monkeypatch.setattr(devices.importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    monkeypatch.setitem(sys.modules, "torch_npu", broken)
    assert devices.resolve_device("cpu") == torch.device("cpu")


def test_dtype_auto_is_the_checkpoints_own() -> None:
    assert devices.resolve_dtype("auto", torch.bfloat16) == torch.bfloat16
    assert devices.resolve_dtype("float32", torch.bfloat16) == torch.float32


def test_dtype_auto_of_weights_that_cannot_compute_is_refused() -> None:
    with pytest.raises(CameraError, match=r"float8_e4m3fn.*choose one of float32"):
        devices.resolve_dtype("auto", torch.float8_e4m3fn)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(CameraError, match="'int8' is none of auto, float32"):
        devices.resolve_dtype("int8", torch.float32)


@pytest.mark.parametrize("name", ["cpu", "npu"])
def test_a_device_describes_itself_in_json(name: str, npu: types.ModuleType) -> None:
    described = devices.describe_device(devices.resolve_device(name))
    assert json.loads(json.dumps(described)) == described
    assert described["kind"] == name
    assert described["name"]
    assert described["memory_bytes"] > 0
    assert described["threads"] == torch.get_num_threads()
    assert ("ascend" in described) == (name == "npu")


def test_a_result_of_an_npu_holds_what_it_depends_on(npu: types.ModuleType) -> None:
    ascend = devices.describe_device(torch.device("npu"))["ascend"]
    assert {
        "soc",
        "cann",
        "driver",
        "firmware",
        "torch",
        "torch_npu",
        "unpaired",
        "internal_formats",
        "graphs",
    } < set(ascend)


def test_peak_memory_sees_what_came_and_went() -> None:
    cpu = torch.device("cpu")
    if not devices.reset_peak_memory(cpu):
        pytest.skip("this system cannot forget an older peak")
    before = devices.memory_bytes(cpu)
    size = 200 << 20
    del_me = torch.ones(size, dtype=torch.uint8)
    del del_me
    assert devices.peak_memory_bytes(cpu) - before > 0.9 * size
    assert devices.memory_bytes(cpu) - before < 0.5 * size
    devices.reset_peak_memory(cpu)
    assert devices.peak_memory_bytes(cpu) - before < 0.5 * size


def test_copies_are_timed_in_bytes_read_and_written(npu: types.ModuleType) -> None:
    for name in ("cpu", "npu"):
        assert 1e7 < devices.copy_bandwidth(torch.device(name), 8 << 20) < 1e13


def test_what_bandwidth_was_measured_by_is_told(
    npu: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[torch.device, int]] = []

    def copies(device: torch.device, size: int) -> float:
        asked.append((device, size))
        return 1e12

    monkeypatch.setattr(devices, "copy_bandwidth", copies)
    found = devices.memory_bandwidth(torch.device("npu", 0))
    assert found == devices.Bandwidth(1e12, "copies of 4.0 GiB, bytes read and written")
    monkeypatch.setattr(devices, "free_memory_bytes", lambda device: 3 << 30)
    assert devices.memory_bandwidth(torch.device("npu", 0)).measured_by.startswith("copies of 1.0 GiB")
    assert asked == [(torch.device("npu", 0), 4 << 30), (torch.device("npu", 0), 1 << 30)]
