import types

import pytest
import torch

from camera.engines.parts.blocks import Blocks
from camera.engines.parts.embedding import BlockEmbedding
from camera.engines.parts.int4_linear import INT4_TYPES
from camera.formats.blocks import dequantize, quantize
from camera.options import BlockType


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", INT4_TYPES)
def test_rows_are_those_of_dequantised_weights(
    npu: types.ModuleType, kind: BlockType, dtype: torch.dtype, device: str
) -> None:
    data = quantize(torch.randn((50, 192), generator=torch.Generator().manual_seed(0)), kind)
    embedding = BlockEmbedding(Blocks(kind, data), dtype, torch.device(device))
    tokens = torch.tensor([[3, 49, 0], [7, 7, 12]])
    exact = torch.from_numpy(dequantize(data, kind, 192))[tokens].to(dtype)
    with torch.no_grad():
        assert torch.equal(embedding(tokens.to(device)).cpu(), exact)


def test_it_holds_the_bytes_of_the_blocks() -> None:
    data = quantize(torch.randn((512, 512)), "q4_0_64")
    embedding = BlockEmbedding(Blocks("q4_0_64", data), torch.float16, torch.device("cpu"))
    assert embedding.nibbles_VH.nbytes + embedding.scales_VG.nbytes == data.nbytes
