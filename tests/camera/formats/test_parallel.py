from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, get_ident

import numpy as np
import pytest
import torch

from camera.formats import blocks
from camera.formats.parallel import map_chunks
from camera.registry import BLOCK_FORMATS


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
