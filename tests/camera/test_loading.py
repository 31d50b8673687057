from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from camera import loading
from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.errors import CameraError
from camera.formats.convert import convert_to_gguf
from camera.loading import Joined, assemble, load_model, open_source
from camera.options import BlockType, QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.tiny import MODEL_TYPES, MOE_TYPES, MOE_TYPES_IN_GGUF, tiny_checkpoint, tiny_moe_checkpoint

IDS = torch.tensor([[1, 9, 30, 77, 200, 3]])


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    checkpoint = Checkpoint.open(folder)
    tensors = {name: checkpoint.read(name).clone() for name in checkpoint.tensors} | change
    write_tensors(
        folder / "model.safetensors", {name: value for name, value in tensors.items() if value is not None}
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_checkpoint_becomes_the_model_that_transformers_loads(
    tmp_path: Path, model_type: str, tied: bool
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", model_type, tied=tied, shards=2)
    mine, theirs = load_model(folder, device="cpu"), Checkpoint.open(folder).load_model()
    with torch.no_grad():
        assert torch.equal(mine(IDS).logits, theirs(IDS).logits)
    assert (mine.lm_head.weight is mine.model.embed_tokens.weight) == tied
    assert not any(tensor.is_meta for tensor in [*mine.parameters(), *mine.buffers()])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_a_mixture_of_experts_becomes_the_model_that_transformers_loads(
    tmp_path: Path, model_type: str, dtype: str
) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", model_type, dtype=torch.bfloat16, shards=2)
    mine = load_model(folder, dtype, device="cpu")
    theirs = Checkpoint.open(folder).load_model(getattr(torch, dtype))
    assert {name: value.dtype for name, value in mine.state_dict().items()} == {
        name: value.dtype for name, value in theirs.state_dict().items()
    }
    with torch.no_grad():
        assert torch.equal(mine(IDS).logits, theirs(IDS).logits)
    assert not any(tensor.is_meta for tensor in [*mine.parameters(), *mine.buffers()])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("f16", torch.float16), ("bf16", torch.bfloat16), ("f32", torch.float32), ("q4_0_64", torch.float32)],
)
def test_auto_is_the_dtype_of_a_ggufs_matrices_and_float32_for_blocks(
    tmp_path: Path, kind: BlockType, dtype: torch.dtype
) -> None:
    source = Checkpoint.open(tiny_checkpoint(tmp_path / "model"))
    quantize_checkpoint(source, tmp_path / "packed", QuantizeOptions(type=kind))
    convert_to_gguf(tmp_path / "packed", tmp_path / "model.gguf", name="tiny")
    assert open_source(tmp_path / "model.gguf").dtype == dtype
    assert load_model(tmp_path / "model.gguf", device="cpu").dtype == dtype


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    rewrite(folder, {"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(CameraError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_a_quantised_mixture_of_experts_and_its_gguf_become_the_same_model(
    tmp_path: Path, model_type: str
) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", model_type)
    quantize_checkpoint(Checkpoint.open(folder), tmp_path / "packed", QuantizeOptions(type="q8_0"))
    packed = load_model(tmp_path / "packed", device="cpu")
    names = open_source(tmp_path / "packed").names
    assert names == set(Checkpoint.open(folder).needed)
    with torch.no_grad():
        assert not torch.equal(packed(IDS).logits, load_model(folder, device="cpu")(IDS).logits)
        if model_type in MOE_TYPES_IN_GGUF:
            convert_to_gguf(tmp_path / "packed", tmp_path / "model.gguf", name="tiny")
            assert torch.equal(
                packed(IDS).logits, load_model(tmp_path / "model.gguf", device="cpu")(IDS).logits
            )


def test_a_missing_matrix_of_an_expert_is_named(tmp_path: Path) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", "mixtral")
    rewrite(folder, {"model.layers.1.block_sparse_moe.experts.7.w2.weight": None})
    with pytest.raises(CameraError, match=r"no tensor .*\.experts\.7\.w2\.weight"):
        load_model(folder, device="cpu")


def test_a_matrix_of_an_expert_with_another_width_is_named(tmp_path: Path) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", "olmoe")
    rewrite(folder, {"model.layers.1.mlp.experts.7.up_proj.weight": torch.ones(64, 64)})
    with pytest.raises(CameraError, match=r"experts\.7\.up_proj\.weight has shape \[64, 64\].*\[96, 64\]"):
        load_model(folder, device="cpu")


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    rewrite(folder, {"model.norm.weight": torch.ones(63)})
    with pytest.raises(CameraError, match=r"model\.norm\.weight has shape \[63\].*asks for \[64\]"):
        load_model(folder, device="cpu")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"pickle")
    with pytest.raises(CameraError, match=r"is a file but no \.gguf"):
        load_model(tmp_path / "model.bin")


def test_a_module_can_be_exchanged_before_anything_is_read_even_if_it_is_tied(tmp_path: Path) -> None:
    source = open_source(tiny_checkpoint(tmp_path / "model", tied=True))
    head = nn.Linear(64, 352)

    def exchange(model: PreTrainedModel, names: Mapping[str, str]) -> dict[str, Joined]:
        model.lm_head = head
        return {}

    model = assemble(source, torch.float32, torch.device("cpu"), exchange)
    assert model.lm_head is head
    assert torch.equal(model.model.embed_tokens.weight, source.read("model.embed_tokens.weight"))


def test_a_parameter_can_be_made_of_several_tensors(tmp_path: Path) -> None:
    source = open_source(tiny_checkpoint(tmp_path / "model"))
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))

    def join(model: PreTrainedModel, names: Mapping[str, str]) -> dict[str, Joined]:
        model.model.layers[0].mlp.up_proj = nn.Linear(64, 384, bias=False, device="meta")
        return {up: {gate: (slice(0, 192),), up: (slice(192, 384),)}}

    model = assemble(source, torch.float32, torch.device("cpu"), join)
    assert torch.equal(model.get_parameter(up), torch.cat([source.read(gate), source.read(up)]))


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "f16"])
def test_matrices_of_blocks_are_dequantised_some_rows_at_a_time(
    tmp_path: Path, kind: BlockType, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Checkpoint.open(tiny_checkpoint(tmp_path / "model"))
    quantize_checkpoint(source, tmp_path / "packed", QuantizeOptions(type=kind))
    monkeypatch.setattr(loading, "_NUMBERS_AT_ONCE", 64 * 50)
    model = load_model(tmp_path / "packed", device="cpu", dtype="float32")
    packed = open_source(tmp_path / "packed")
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        assert torch.equal(model.get_parameter(name), packed.read(name))
