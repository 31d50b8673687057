from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, get_ident

import numpy as np
import pytest
import torch

from camera.formats import blocks
from camera.formats.parallel import map_chunks
from camera.quantization.factor import Factor
from camera.registry import BLOCK_FORMATS
from tests.camera.formats.in_memory import quantize_by_gptq


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_several_threads_of_one_core_each() -> None:
    together = Barrier(3)

    def work(start: int) -> tuple[int, int, int]:
        together.wait(timeout=30)
        return start, get_ident(), torch.get_num_threads()

    starts, threads, cores = zip(*map_chunks(work, range(0, 30, 10)), strict=True)
    assert starts == (0, 10, 20)
    assert len(set(threads)) == 3
    assert cores == (1, 1, 1)


def test_torch_has_its_threads_again_here_and_in_threads_to_come() -> None:
    map_chunks(lambda start: start, range(5))
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 3


def test_the_first_error_in_order_is_raised() -> None:
    def work(start: int) -> None:
        if start > 1:
            raise ValueError(str(start))

    with pytest.raises(ValueError, match="2"):
        map_chunks(work, range(6))


@pytest.mark.parametrize("type", BLOCK_FORMATS)
def test_bytes_and_numbers_do_not_depend_on_the_threads(type: str) -> None:
    weight = torch.randn(700, 2048, generator=torch.Generator().manual_seed(0))
    packed = blocks.quantize(weight, type)
    numbers = blocks.dequantize(packed, type, 2048)
    torch.set_num_threads(1)
    assert np.array_equal(blocks.quantize(weight, type), packed)
    assert np.array_equal(blocks.dequantize(packed, type, 2048), numbers)


def test_threads_compute_in_inference_mode_where_the_caller_does() -> None:
    assert map_chunks(lambda start: torch.is_inference_mode_enabled(), range(5)) == [False] * 5
    with torch.inference_mode():
        assert map_chunks(lambda start: torch.is_inference_mode_enabled(), range(5)) == [True] * 5


def test_a_matrix_of_several_chunks_is_packed_and_read_in_inference_mode() -> None:
    weight = torch.randn(1100, 1024, generator=torch.Generator().manual_seed(0))
    factor = Factor.identity(1024)
    with torch.inference_mode():
        matrix = weight.clone()
        packed = quantize_by_gptq({"w": matrix}, "q4_0", factor)["w"]
        numbers = blocks.dequantize(packed, "q4_0", 1024)
    np.testing.assert_array_equal(packed, quantize_by_gptq({"w": weight}, "q4_0", factor)["w"])
    np.testing.assert_array_equal(numbers, blocks.dequantize(packed, "q4_0", 1024))
