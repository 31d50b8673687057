"""Tensors go to an accelerator and back through a little pinned memory, in chunks and in order."""

import types

import pytest
import torch

from camera.layerwise.transfer import Transfer, ready_event

TENSORS = {
    "matrix": torch.randn(7, 33),
    "half": torch.randn(51, 3).bfloat16(),
    "turned": torch.randn(4, 9).T,
    "number": torch.tensor(3.5),
    "none": torch.empty(0, 5),
    "whole": torch.arange(40),
}


@pytest.fixture
def device(npu: types.ModuleType) -> torch.device:
    return torch.device("npu", 0)


@pytest.mark.parametrize("buffer_bytes", [8, 100, 1 << 20])
def test_what_comes_back_is_what_was_sent(device: torch.device, buffer_bytes: int) -> None:
    transfer = Transfer(device, buffer_bytes)
    uploaded = transfer.upload((name, tensor, tensor.dtype) for name, tensor in TENSORS.items())
    assert transfer.names_not_finite(uploaded) == []
    on_device = uploaded.take()
    assert {tensor.device for tensor in on_device.values()} == {device}
    back = transfer.download(on_device, ready_event(device))
    assert all(torch.equal(back[name], tensor) for name, tensor in TENSORS.items())
    assert {tensor.device.type for tensor in back.values()} == {"cpu"}


def test_a_tensor_is_converted_where_it_arrives(device: torch.device) -> None:
    sent = TENSORS["half"]
    taken = Transfer(device).upload([("x", sent, torch.float32)]).take()["x"]
    assert taken.dtype == torch.float32
    assert torch.equal(taken.cpu(), sent.float())


def test_one_that_was_made_in_inference_mode_serves_outside_of_it(device: torch.device) -> None:
    with torch.inference_mode():
        transfer = Transfer(device)
    taken = transfer.upload([("x", torch.ones(3), torch.float32)]).take()["x"]
    assert taken.cpu().tolist() == [1, 1, 1]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_tensors_that_are_not_finite_are_told_by_name(device: torch.device, bad: float) -> None:
    spoilt = torch.ones(5, 5)
    spoilt[4, 2] = bad
    transfer = Transfer(device)
    uploaded = transfer.upload([("good", torch.ones(3), torch.float32), ("bad", spoilt, torch.bfloat16)])
    assert transfer.names_not_finite(uploaded) == ["bad"]


def test_what_is_on_the_host_already_comes_back_as_it_is(device: torch.device) -> None:
    tensor = torch.ones(3)
    assert Transfer(device).download({"x": tensor}, ready_event(device))["x"] is tensor
