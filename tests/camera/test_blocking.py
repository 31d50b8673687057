"""Whether times of a device would be false."""

import pytest

from camera.blocking import blocking


@pytest.mark.parametrize(
    ("kind", "name"), [("npu", "ASCEND_LAUNCH_BLOCKING"), ("cuda", "CUDA_LAUNCH_BLOCKING")]
)
def test_a_variable_that_is_set_is_named(kind: str, name: str) -> None:
    assert blocking(kind, {name: "1"}) == name
    assert [blocking(kind, given) for given in ({}, {name: "0"}, {name: ""})] == [None] * 3


def test_the_cpu_has_none() -> None:
    assert blocking("cpu", {"ASCEND_LAUNCH_BLOCKING": "1"}) is None
