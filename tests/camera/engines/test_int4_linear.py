import logging
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from camera.engines.parts import blocks as blocks_module
from camera.engines.parts import int4_choice
from camera.engines.parts.blocks import Blocks, codes_of, scales_of
from camera.engines.parts.int4_choice import KERNELS, KernelChoice, usable
from camera.engines.parts.int4_linear import (
    INT4_TYPES,
    BlockwiseInt4Linear,
    CpuInt4Linear,
    CudaInt4Linear,
    Int4Linear,
    Int4Parts,
    blockwise_product,
    rows_of_a_part,
)
from camera.engines.parts.int4_measure import TOKENS
from camera.engines.parts.int4_npu import NpuInt4Linear, TiledNpuInt4Linear, TransposedNpuInt4Linear
from camera.engines.parts.int4_trial import Key, Shape, Trial, Variant
from camera.engines.parts.int4_trials import VARIANTS
from camera.formats.blocks import dequantize, quantize
from camera.options import BlockType
from tests import fake_npu

CPU = torch.device("cpu")


def random_blocks(kind: BlockType, rows: int, columns: int) -> Blocks:
    weight = torch.randn((rows, columns), generator=torch.Generator().manual_seed(1))
    return Blocks(kind, quantize(weight, kind))


def weights(blocks: Blocks) -> torch.Tensor:
    return torch.cat([part for _, part in blocks.dequantized()])


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float().cpu() - exact).norm() / exact.norm())


def int4_linear(
    blocks: Blocks, bias: torch.Tensor | None, device: torch.device
) -> Int4Linear | Int4Parts | str:
    return KernelChoice(device).layer(blocks, bias)


@pytest.fixture(autouse=True)
def _forget_checks() -> None:
    usable.cache_clear()


@pytest.mark.parametrize("kind", INT4_TYPES)
def test_blocks_come_apart_into_what_dequantising_multiplies(kind: BlockType) -> None:
    blocks = random_blocks(kind, 48, 192)
    stored = blocks.read(0, 48)
    scales = scales_of(stored).float().repeat_interleave(blocks.group, dim=1)
    exact = torch.from_numpy(dequantize(blocks.matrices[0], kind, 192))
    assert torch.equal((codes_of(stored).float() - 8) * scales, exact)
    assert torch.equal(weights(blocks), exact)


@pytest.mark.parametrize("tokens", [1, 4, 64, 65, 130])
@pytest.mark.parametrize("kind", INT4_TYPES)
def test_on_the_cpu_it_equals_dequantised_weights_within_bfloat16(kind: BlockType, tokens: int) -> None:
    blocks = random_blocks(kind, 144, 192)
    bias = torch.linspace(-3, 3, 144)
    layer = int4_linear(blocks, bias, CPU)
    assert isinstance(layer, CpuInt4Linear)
    x = torch.randn((1, tokens, 192), generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = F.linear(x.float(), weights(blocks), bias.bfloat16().float())
    assert layer(x).shape == (1, tokens, 144)
    assert relative(layer(x), exact) < 0.006


@pytest.mark.parametrize("rows", [(256,), (96, 32, 144)])
def test_packing_in_pieces_gives_the_same_layer_wherever_matrices_meet(
    monkeypatch: pytest.MonkeyPatch, rows: tuple[int, ...]
) -> None:
    matrices = [random_blocks("q4_0_64", count, 128).matrices[0] for count in rows]
    blocks = Blocks("q4_0_64", *matrices)
    whole = CpuInt4Linear(blocks, None, CPU)
    monkeypatch.setattr(blocks_module, "_WEIGHTS_AT_ONCE", 1)
    pieces = CpuInt4Linear(blocks, None, CPU)
    assert torch.equal(whole.packed, pieces.packed)
    assert torch.equal(whole.scales, pieces.scales)
    for tokens in (1, 100):  # 100 go through dequantised rows, which are read in pieces too
        x = torch.randn((tokens, 128)).bfloat16()
        alone = torch.cat([F.linear(x.float(), weights(Blocks("q4_0_64", each))) for each in matrices], dim=1)
        assert relative(pieces(x), alone) < 0.006


def test_it_holds_about_half_a_byte_for_a_weight() -> None:
    for kind, bits in (("q4_0", 5.0), ("q4_0_64", 4.5)):
        layer = CpuInt4Linear(random_blocks(kind, 256, 1024), None, CPU)
        assert 8 * sum(buffer.nbytes for buffer in layer.buffers()) / (256 * 1024) == bits


@pytest.mark.parametrize("kind", INT4_TYPES)
def test_rows_that_tiles_do_not_divide_are_filled_up_and_cut_off_again(kind: BlockType) -> None:
    blocks, bias = random_blocks(kind, 40, 64), torch.linspace(-3, 3, 40)
    layer = int4_linear(blocks, bias, CPU)
    assert isinstance(layer, Int4Parts)
    assert layer.kernel == CpuInt4Linear.kernel
    for tokens in (1, 4, 100):  # 100 go through dequantised rows
        x = torch.randn((2, tokens, 64)).bfloat16()
        assert layer(x).shape == (2, tokens, 40)
        assert relative(layer(x), F.linear(x.float(), weights(blocks), bias)) < 0.006


def test_a_matrix_of_more_rows_than_a_kernel_takes_is_multiplied_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CpuInt4Linear, "rows_limit", 72)
    upper, lower = random_blocks("q4_0_64", 100, 128), random_blocks("q4_0_64", 50, 128)
    blocks, bias = Blocks("q4_0_64", *upper.matrices, *lower.matrices), torch.linspace(-3, 3, 150)
    layer = int4_linear(blocks, bias, CPU)
    assert isinstance(layer, Int4Parts)
    assert [part.out_features for part in layer.parts] == [64, 64, 64]
    assert layer.kernel.endswith("in 3 parts")
    x = torch.randn((5, 128)).bfloat16()
    assert relative(layer(x), F.linear(x.float(), weights(blocks), bias)) < 0.006


def test_openpangus_head_is_three_equal_parts_on_an_npu() -> None:
    assert rows_of_a_part(153_376, [NpuInt4Linear]) == 51_136
    assert rows_of_a_part(65_472, [NpuInt4Linear]) == 65_472
    assert rows_of_a_part(65_535, [NpuInt4Linear]) == 32_768  # 65,536 would be one row too many


@pytest.mark.parametrize(
    ("kernel", "shape", "group", "reason"),
    [
        (CudaInt4Linear, (12, 128), 64, "12 rows"),
        (CudaInt4Linear, (128, 48), 32, "48 columns"),
        (NpuInt4Linear, (153_376, 4096), 64, "153376 rows are more than 65535"),
        (NpuInt4Linear, (64, 65_600), 64, "65600 columns are more than 65535"),
        (NpuInt4Linear, (96, 128), 64, "96 rows are no multiple of 64"),
        (NpuInt4Linear, (64, 64), 64, "a group of 64 is a whole row"),
        (TiledNpuInt4Linear, (128, 128), 32, "groups of 64 or 128, not 32"),
    ],
)
def test_each_kernels_rules_are_known_before_it_is_tried(
    kernel: type[Int4Linear], shape: tuple[int, int], group: int, reason: str
) -> None:
    assert reason in str(kernel.why_not(*shape, group))
    assert kernel.why_not(128, 256, 64) is None


@pytest.mark.parametrize("kind", INT4_TYPES)
@pytest.mark.parametrize("layout", [NpuInt4Linear, TransposedNpuInt4Linear])
def test_on_an_npu_it_obeys_the_operators_rules_and_equals_dequantised_weights(
    npu: types.ModuleType, kind: BlockType, layout: type[NpuInt4Linear]
) -> None:
    device = torch.device("npu", 0)
    blocks, bias = random_blocks(kind, 192, 256), torch.linspace(-3, 3, 192)
    layer = layout(blocks, bias, device, inner_precise=1)
    x = torch.randn((2, 16, 256), generator=torch.Generator().manual_seed(2)).half()
    exact = F.linear(x.float(), weights(blocks), bias)
    found = layer(x.to(device))
    assert (found.device.type, found.dtype, tuple(found.shape)) == ("npu", torch.float16, (2, 16, 192))
    assert relative(found, exact) < 0.001


def test_an_npu_whose_layouts_cannot_be_tried_multiplies_in_the_plain_one_and_says_so(
    npu: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = KernelChoice(torch.device("npu", 0))
    with caplog.at_level(logging.WARNING):
        layer = kernels.layer(random_blocks("q4_0_64", 128, 128), None)
    assert type(layer) is NpuInt4Linear
    assert layer.kernel == "npu_weight_quant_batchmatmul, ND, inner_precise=0"
    assert kernels.untried == "the emulated NPU is of one process"
    assert kernels.untried in caplog.text


def held(best: Variant, wrong: Variant) -> Callable[..., list[Trial]]:
    """Trials in which a variant is the fastest that is right, and another faster and wrong with 16 tokens."""

    def try_layouts(shapes: Sequence[Shape], device: torch.device) -> list[Trial]:
        trials = []
        for variant in VARIANTS:
            for shape in shapes:
                for tokens in TOKENS:
                    key = Key(*variant, *shape, tokens)
                    time = 1.0 if variant == wrong else 2.0 if variant == best else 3.0
                    off = variant == wrong and tokens == 16
                    trials.append(key.failed("off") if off else Trial(**key._asdict(), microseconds=time))
        return trials

    return try_layouts


def test_an_npu_multiplies_in_the_layout_that_was_fastest_with_one_token_and_right_with_all(
    npu: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    best, wrong = Variant("transposed", 1), Variant("plain", 1)
    monkeypatch.setattr(int4_choice, "try_layouts", held(best, wrong))
    kernels = KernelChoice(torch.device("npu", 0))
    layer = kernels.layer(random_blocks("q4_0_64", 128, 128), None)
    assert isinstance(layer, TransposedNpuInt4Linear)
    assert layer.inner_precise == 1
    assert layer.kernel == "npu_weight_quant_batchmatmul, ND transposed, inner_precise=1"
    assert kernels.microseconds["q4_0_64 128 x 128"]["transposed, inner_precise=1"] == 2.0
    assert kernels.untried is None


def test_a_matrix_for_which_every_layout_is_wrong_is_dequantised(
    npu: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_wrong(shapes: Sequence[Shape], device: torch.device) -> list[Trial]:
        return [Key(*variant, *shape, 1).failed("off by 7 %") for variant in VARIANTS for shape in shapes]

    monkeypatch.setattr(int4_choice, "try_layouts", all_wrong)
    reason = int4_linear(random_blocks("q4_0_64", 128, 128), None, torch.device("npu", 0))
    assert reason == "no layout is right for q4_0_64 128 x 128: off by 7 %"


def test_all_shapes_of_a_model_are_tried_at_once(
    npu: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def try_layouts(shapes: Sequence[Shape], device: torch.device) -> list[Trial]:
        asked.append(shapes)
        return held(Variant("plain", 0), Variant("tiled", 0))(shapes, device)

    monkeypatch.setattr(int4_choice, "try_layouts", try_layouts)
    matrices = [random_blocks("q4_0_64", rows, 128) for rows in (128, 200, 128)]
    kernels = KernelChoice(torch.device("npu", 0))
    kernels.prepare(matrices)
    assert all(not isinstance(kernels.layer(each, None), str) for each in matrices)
    assert asked == [[Shape(128, 128, 64), Shape(256, 128, 64)]]


def test_a_kernel_that_computes_something_else_is_not_used(
    npu: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def wrong(*args: torch.Tensor, **options: Any) -> torch.Tensor:
        right = fake_npu.npu_weight_quant_batchmatmul(*args, **options)
        return fake_npu.NpuTensor(right.host.roll(1, dims=1))

    monkeypatch.setattr(npu, "npu_weight_quant_batchmatmul", wrong)
    with caplog.at_level(logging.WARNING):
        reason = int4_linear(random_blocks("q4_0_64", 128, 128), None, torch.device("npu", 0))
    assert isinstance(reason, str)
    assert "against dequantised weights" in reason
    assert "is not used for q4_0_64" in caplog.text


def test_a_kernel_is_checked_once_and_not_for_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    pack = CpuInt4Linear.pack
    monkeypatch.setattr(CpuInt4Linear, "pack", lambda *args: (tried.append(1), pack(*args))[1])
    for _ in range(3):
        int4_linear(random_blocks("q4_0", 32, 64), None, CPU)
    assert len(tried) == 1 + 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("kind", INT4_TYPES)
def test_on_a_gpu_it_equals_dequantised_weights_within_bfloat16(kind: BlockType) -> None:
    blocks = random_blocks(kind, 256, 1024)
    layer = int4_linear(blocks, None, torch.device("cuda", 0))
    assert isinstance(layer, CudaInt4Linear)
    x = torch.randn((5, 1024)).bfloat16()
    assert relative(layer(x.cuda()), F.linear(x.float(), weights(blocks))) < 0.006


def test_every_kind_of_device_has_a_kernel() -> None:
    assert set(KERNELS) == {"cpu", "cuda", "npu"}


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("kind", INT4_TYPES)
def test_a_product_of_the_files_own_blocks_equals_dequantised_weights(kind: BlockType, tokens: int) -> None:
    blocks = random_blocks(kind, 144, 192)
    layer = BlockwiseInt4Linear(blocks, torch.linspace(-3, 3, 144), CPU)
    x = torch.randn((tokens, 192), generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = F.linear(x.float(), weights(blocks), torch.linspace(-3, 3, 144).bfloat16().float())
    assert relative(layer(x), exact) < 0.006
    assert layer.packed.nbytes + layer.scales.nbytes == blocks.matrices[0].nbytes


def test_a_challenger_is_timed_once_for_a_shape_and_must_save_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "cpu", (CpuInt4Linear, BlockwiseInt4Linear))
    for share, winner in ((1.0, CpuInt4Linear), (-1e9, BlockwiseInt4Linear)):
        monkeypatch.setattr(int4_choice, "_MUST_WIN_BY", share)
        kernels = KernelChoice(CPU)
        made = [kernels.layer(random_blocks("q4_0", 64, 256), None) for _ in range(2)]
        assert [type(layer) for layer in made] == [winner, winner]
        (trial,) = kernels.microseconds.values()
        assert trial.keys() == {CpuInt4Linear.kernel, BlockwiseInt4Linear.kernel}


@pytest.mark.slow
@pytest.mark.parametrize("kind", INT4_TYPES)
def test_the_product_of_blocks_can_be_compiled(kind: BlockType) -> None:
    blocks = random_blocks(kind, 144, 192)
    layer = BlockwiseInt4Linear(blocks, None, CPU)
    x_K = torch.randn(192, generator=torch.Generator().manual_seed(2))
    compiled = torch.compile(blockwise_product, dynamic=False)(x_K, layer.packed, layer.scales)
    assert relative(compiled, F.linear(x_K, weights(blocks))) < 1e-5
