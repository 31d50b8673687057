"""A request that travels to another host: what it checks there before it measures."""

import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from camera.devices import describe_device, devices_of, resolve_device
from camera.digests import digest_file, digest_json
from camera.errors import CameraError
from camera.options import BenchmarkOptions, CaptureOptions, QuantizeOptions
from flows.benchmark import check_device
from flows.device_limits import limit_names
from flows.remote import RemoteRequest
from tasks.options import Sections
from tasks.stage import Input, Request, RunReferences, Stage
from tasks.stages import capture, quantize
from tasks.stages.benchmark import STAGE
from tasks.store import Store
from tests.tasks.conftest import toy_stage

ASKED = Sections(benchmark=BenchmarkOptions(device="cpu"))


def write(folder: Path) -> dict[str, float]:
    (folder / "content.txt").write_text("made before")
    return {}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def request_(store: Store, tmp_path: Path) -> Request:
    """A benchmark request that reads an artifact of the store and a model outside it."""
    artifact = store.make("save", "a" * 64, write, {}, {}, resumes=False)
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(b"0123")
    files = {"weights": digest_file(model / "weights")}
    inputs = {
        "pruned": Input.of(artifact),
        "original": Input(model, digest_json(files), about={"path": "model", "files": files}),
    }
    name = describe_device(resolve_device("cpu"))["name"]
    return Request("benchmark", stage(1), ASKED, inputs, {"device": "cpu", "device_name": name})


def stage(version: int) -> Stage:
    return replace(STAGE, version=version, run=lambda context: {})


def travelled(request: Request) -> RemoteRequest:
    """What arrives: plain JSON."""
    return RemoteRequest.model_validate_json(RemoteRequest.of(request).model_dump_json())


def test_the_request_that_arrives_has_the_same_key_and_its_inputs(request_: Request, store: Store):
    there = travelled(request_).restored(stage(1), store, RunReferences())
    assert there.key == request_.key
    assert there.inputs["pruned"].path == request_.inputs["pruned"].path
    assert there.inputs["original"].path == request_.inputs["original"].path.resolve()
    assert there.inputs["original"].about == request_.inputs["original"].about


def test_another_store_there_is_told(request_: Request, tmp_path: Path):
    with pytest.raises(CameraError, match=r"input pruned: save/aaaaaaaaaaaa is not in .*CAMERA_HOME"):
        travelled(request_).restored(stage(1), Store(tmp_path / "another"), RunReferences())


def test_another_model_under_the_same_path_is_refused(request_: Request, store: Store):
    (request_.inputs["original"].path / "weights").write_bytes(b"0124")
    with pytest.raises(CameraError, match=r"input original: .* is not the same on this host"):
        travelled(request_).restored(stage(1), store, RunReferences())


def test_a_missing_model_there_is_told(request_: Request, store: Store):
    request_.inputs["original"].path.rename(store.root.parent / "moved")
    with pytest.raises(CameraError, match=r"input original: .* is not on this host"):
        travelled(request_).restored(stage(1), store, RunReferences())


def test_other_code_there_is_refused(request_: Request, store: Store):
    with pytest.raises(CameraError, match="install the same version"):
        travelled(request_).restored(stage(2), store, RunReferences())


def test_a_device_of_another_name_does_not_measure(request_: Request):
    given = travelled(request_)
    check_device(given)
    another = given.model_copy(update={"facts": {**given.facts, "device_name": "Ascend910B1"}})
    with pytest.raises(CameraError, match="the recipe says 'Ascend910B1'"):
        check_device(another)


def test_a_stage_holds_the_devices_it_computes_on_and_no_others(request_: Request):
    (name,) = limit_names(request_)
    assert name.startswith("camera-")
    assert name.endswith("-cpu-0")
    without = Request("save", toy_stage("save", lambda context: {}), Sections(), {})
    assert limit_names(without) == []


def test_a_run_of_two_ranks_holds_the_two_cards_that_it_computes_on(
    npu: types.ModuleType, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.get_device_module("npu"), "device_count", lambda: 3)
    options = CaptureOptions(device="npu:1", devices=2)
    capturing = Request("capture", capture.STAGE, Sections(capture=options), {}, {"device": "npu"})
    assert [name[-5:] for name in limit_names(capturing)] == ["npu-1", "npu-2"]
    computing = [str(device) for device in devices_of(options.device, options.devices)]
    assert computing == ["npu:1", "npu:2"]
    packing = Request("quantize", quantize.STAGE, Sections(quantize=QuantizeOptions(device="npu:2")), {})
    assert [name[-5:] for name in limit_names(packing)] == ["npu-2"]
    on_cpu = Request("quantize", quantize.STAGE, Sections(quantize=QuantizeOptions(device="cpu")), {})
    assert limit_names(on_cpu) == []
    beyond = CaptureOptions(device="npu:2", devices=2)
    with pytest.raises(CameraError, match="up to npu:3, which does not exist"):
        limit_names(Request("capture", capture.STAGE, Sections(capture=beyond), {}, {"device": "npu"}))
