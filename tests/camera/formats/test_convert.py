import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.files import read_json
from camera.formats.convert import convert_to_gguf, write_twin
from camera.formats.gguf_reader import (
    hf_config,
    hf_names,
    is_q4_0_64,
    open_gguf,
    packed_hf_tensor,
    read_hf_tensor,
)
from camera.formats.quantized_model import QuantizedModel
from camera.formats.rope import rope_parameters
from camera.models import FAMILIES
from camera.options import BlockType, QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from camera.registry import BLOCK_FORMATS
from tests.tiny import MODEL_TYPES, TOKENS, tiny_checkpoint

SENTENCEPIECE = ("llama", "PanguEmbedded")
ROWS = TOKENS + 32  # so that the vocabulary has to be padded


def converted(folder: Path, model_type: str = "llama", type: BlockType = "q4_0_64", **sizes: Any) -> Path:
    """A GGUF file of a tiny model; the checkpoint and the packed folder stay beside it."""
    source = tiny_checkpoint(folder / "source", model_type, vocab=ROWS, **sizes)
    return converted_from(source, folder, type)


def converted_from(source: Path, folder: Path, type: BlockType) -> Path:
    quantize_checkpoint(Checkpoint.open(source), folder / "packed", QuantizeOptions(type=type))
    convert_to_gguf(folder / "packed", folder / "model.gguf", name="tiny", lineage={"b": 1, "a": "ü"})
    return folder / "model.gguf"


@pytest.mark.parametrize("type", ["f16", "q4_0_64"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_re_read_gives_every_tensor_back_to_the_bit(
    tmp_path: Path, model_type: str, type: BlockType
) -> None:
    file = open_gguf(converted(tmp_path, model_type, type))
    model = QuantizedModel.open(tmp_path / "packed")
    assert hf_names(file).keys() == model.tensors.keys()
    for name in model.tensors:
        stored_type, data = packed_hf_tensor(file, name)
        assert stored_type == model.tensors[name].type
        np.testing.assert_array_equal(data, model.packed(name))
        assert torch.equal(read_hf_tensor(file, name), model.dequantize(name))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_keys_are_those_that_llama_cpp_asks_for(tmp_path: Path, model_type: str) -> None:
    metadata = open_gguf(converted(tmp_path, model_type)).metadata
    architecture = FAMILIES[model_type].gguf_architecture
    config = read_json(tmp_path / "source" / "config.json")
    expected = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": "tiny",
        "general.size_label": "148K",
        "general.file_type": 39,
        "general.quantization_version": 2,
        "block_count": 2,
        "context_length": 512,
        "embedding_length": 64,
        "feed_forward_length": 192,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "rope.dimension_count": 16,
        "rope.freq_base": 16e6 if model_type == "PanguEmbedded" else 10000.0,
        "vocab_size": ROWS,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": model_type in SENTENCEPIECE,
        "tokenizer.chat_template": read_json(tmp_path / "source" / "tokenizer_config.json")["chat_template"],
        "camera.block_type": "q4_0_64",
        "camera.q4_0_64.layout": "block=64;bytes=34;scale=fp16;nibbles=offset8;low=0..31;high=32..63",
        "camera.lineage": '{"a":"ü","b":1}',
    }
    model_keys = {"block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"}
    for key, value in expected.items():
        own = key in model_keys or key.split(".")[0] in ("attention", "rope")
        assert metadata[f"{architecture}.{key}" if own else key] == value, key
    assert config["vocab_size"] == ROWS
    rest = metadata.keys() - {f"{architecture}.{key}" for key in expected} - expected.keys()
    assert all(key.startswith("tokenizer.ggml.") for key in rest), rest


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_computes_the_same_logits_from_the_file_alone(
    tmp_path: Path, model_type: str, tied: bool
) -> None:
    file = open_gguf(converted(tmp_path, model_type, "f32", tied=tied))
    rebuilt = tmp_path / "rebuilt"
    rebuilt.mkdir()
    (rebuilt / "config.json").write_text(json.dumps(hf_config(file)))
    tensors = {name: read_hf_tensor(file, name).contiguous() for name in hf_names(file)}
    from camera.checkpoints.safetensors_file import write_tensors

    write_tensors(rebuilt / "model.safetensors", tensors)
    tokens = torch.tensor([[1, 20, 300, 7, 45]])
    with torch.no_grad():
        expected = Checkpoint.open(tmp_path / "source").load_model()(tokens).logits
        assert torch.equal(Checkpoint.open(rebuilt).load_model()(tokens).logits, expected)
    assert ("output.weight" in file.tensors) is not tied


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_the_gguf_library_reads_the_stock_types(tmp_path: Path, model_type: str, type: BlockType) -> None:
    path = converted(tmp_path, model_type, type)
    reader = gguf.GGUFReader(path)
    ours = open_gguf(path)
    assert [tensor.name for tensor in reader.tensors] == list(ours.tensors)
    for theirs in reader.tensors:
        tensor = ours.tensors[theirs.name]
        assert theirs.tensor_type.name.lower() == tensor.type
        assert tuple(theirs.shape.tolist()[::-1]) == tensor.shape
        expected = gguf.dequantize(theirs.data, theirs.tensor_type).reshape(tensor.shape)
        np.testing.assert_array_equal(ours.dequantize(theirs.name).numpy(), expected)
    for key, value in ours.metadata.items():
        field = reader.get_field(key)
        assert field is not None
        assert field.contents() == value
    assert ours.metadata["general.file_type"] == BLOCK_FORMATS[type].file_number


def test_llama_s_queries_and_keys_are_interleaved_and_openpangu_s_are_not(tmp_path: Path) -> None:
    for model_type, permuted in (("llama", True), ("PanguEmbedded", False)):
        file = open_gguf(converted(tmp_path / model_type, model_type, "f32"))
        source = Checkpoint.open(tmp_path / model_type / "source")
        for part, heads in (("q", 4), ("k", 2)):
            weight = source.read(f"model.layers.1.self_attn.{part}_proj.weight")
            if permuted:  # of each head first, ninth, second, tenth ... row
                order = [
                    head * 16 + pair + half * 8
                    for head in range(heads)
                    for pair in range(8)
                    for half in (0, 1)
                ]
                weight = weight[order]
            assert torch.equal(file.dequantize(f"blk.1.attn_{part}.weight"), weight)


def test_llama_s_query_and_key_biases_follow_their_rows(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    source = tiny_checkpoint(tmp_path / "source")
    config = LlamaConfig.from_pretrained(source, attention_bias=True)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(source)
    file = open_gguf(converted_from(source, tmp_path, "f32"))
    assert hf_config(file)["attention_bias"] is True
    for name in hf_names(file):
        assert torch.equal(read_hf_tensor(file, name), model.state_dict()[name]), name


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    first = converted(tmp_path).read_bytes()
    convert_to_gguf(tmp_path / "packed", tmp_path / "again.gguf", name="tiny", lineage={"a": "ü", "b": 1})
    assert (tmp_path / "again.gguf").read_bytes() == first


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_twin_is_a_stock_file_with_the_same_numbers(tmp_path: Path, model_type: str) -> None:
    path = converted(tmp_path, model_type)
    summary = write_twin(path, tmp_path / "twin.gguf")
    original, twin = open_gguf(path), open_gguf(tmp_path / "twin.gguf")
    assert is_q4_0_64(original)
    assert not is_q4_0_64(twin)
    assert summary["file_type"] == twin.metadata["general.file_type"] == 2
    assert twin.metadata["camera.twin_of"] == "q4_0_64"
    assert "camera.q4_0_64.layout" not in twin.metadata
    changed = {"general.file_type", "camera.block_type", "camera.q4_0_64.layout", "camera.twin_of"}
    for key in original.metadata.keys() - changed:
        assert twin.metadata[key] == original.metadata[key]
        assert twin.value_types[key] == original.value_types[key]
    stock = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "twin.gguf").tensors}
    for name in original.tensors:
        numbers = gguf.dequantize(stock[name].data, stock[name].tensor_type)
        np.testing.assert_array_equal(
            original.dequantize(name).numpy(), numbers.reshape(original.tensors[name].shape)
        )


def test_a_file_without_q4_0_64_has_no_twin(tmp_path: Path) -> None:
    path = converted(tmp_path, type="q4_0")
    with pytest.raises(CameraError, match="needs no twin"):
        write_twin(path, tmp_path / "twin.gguf")


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = converted(tmp_path)
    with pytest.raises(CameraError, match="already exists"):
        convert_to_gguf(tmp_path / "packed", path, name="tiny")


def test_a_failed_conversion_leaves_no_file(tmp_path: Path) -> None:
    converted(tmp_path)
    (tmp_path / "packed" / "tokenizer.model").unlink()
    with pytest.raises(CameraError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        convert_to_gguf(tmp_path / "packed", tmp_path / "other.gguf", name="tiny")
    assert not list(tmp_path.glob("*other*"))


def test_mixed_types_are_written_as_they_were_packed(tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_checkpoint(tmp_path / "source", ffn=96))
    options = QuantizeOptions(type="q4_0_64", output_type="q8_0", embedding_type="f16")
    quantize_checkpoint(source, tmp_path / "packed", options)
    summary = convert_to_gguf(tmp_path / "packed", tmp_path / "model.gguf", name="tiny")
    types = {name: tensor.type for name, tensor in open_gguf(tmp_path / "model.gguf").tensors.items()}
    assert types["output.weight"] == "q8_0"
    assert types["token_embd.weight"] == "f16"
    assert types["blk.0.ffn_down.weight"] == "q8_0"  # 96 is no multiple of 64
    assert types["blk.0.ffn_up.weight"] == "q4_0_64"
    assert summary["tensors"] == {"f16": 1, "f32": 5, "q4_0_64": 12, "q8_0": 3}
    assert summary["file_type"] == 39


def test_a_real_trained_model_survives_conversion(tmp_path: Path, shared_data: Path) -> None:
    source = shared_data / "models" / "stories260k"
    file = open_gguf(converted_from(source, tmp_path, "q4_0_64"))
    model = QuantizedModel.open(tmp_path / "packed")
    assert "output.weight" not in file.tensors
    assert {tensor.type for name, tensor in file.tensors.items() if "ffn_down" in name} == {"f16"}
    for name in hf_names(file):
        assert torch.equal(read_hf_tensor(file, name), model.dequantize(name))
    assert file.metadata["tokenizer.ggml.model"] == "llama"
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 512


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256},
    "yarn written out": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.5,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def with_rope(folder: Path, scaling: dict[str, Any]) -> Path:
    config = read_json(folder / "config.json")
    config["rope_parameters"] = {"rope_theta": 5000.0, **scaling}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_rotary_positions_survive_conversion(tmp_path: Path, kind: str) -> None:
    source = with_rope(tiny_checkpoint(tmp_path / "source"), ROPES[kind])
    config = hf_config(open_gguf(converted_from(source, tmp_path, "f32")))
    assert config["rope_theta"] == 5000.0
    assert config["rope_scaling"] == ROPES[kind]


def test_llama_3_s_factors_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    source = with_rope(tiny_checkpoint(tmp_path / "source", heads=1, kv_heads=1), ROPES["llama3"])
    file = open_gguf(converted_from(source, tmp_path, "f32"))
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](Checkpoint.open(source).hf_config, torch.device("cpu"))
    plain = 5000.0 ** (-torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(plain / file.dequantize("rope_freqs.weight"), frequencies)


@pytest.mark.parametrize(
    ("written", "refused"),
    [
        ({"truncate": True, "mscale": 0.7}, None),  # what transformers takes for granted, or passes over
        ({"truncate": False}, "do not round the range"),
        ({"beta_fast": 16.0}, "beta_fast"),
        ({"mscale": 0.7, "mscale_all_dim": 0.5}, "GGUF cannot say"),
        ({"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.5}, "GGUF cannot say"),
    ],
)
def test_of_yarn_s_further_numbers_those_are_refused_that_gguf_cannot_say(
    written: dict[str, Any], refused: str | None
) -> None:
    config = {"rope_parameters": {"rope_theta": 5000.0, **ROPES["yarn"], **written}}
    if refused is None:
        assert rope_parameters(config) == {"rope_theta": 5000.0, **ROPES["yarn"]}
    else:
        with pytest.raises(CameraError, match=refused):
            rope_parameters(config)


def test_a_rotary_type_that_gguf_lacks_is_refused(tmp_path: Path) -> None:
    source = with_rope(tiny_checkpoint(tmp_path / "source"), {"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(CameraError, match=r"rope parameters.*dynamic"):
        converted_from(source, tmp_path, "f32")


def test_a_copy_of_the_packed_folder_is_all_that_conversion_needs(tmp_path: Path) -> None:
    first = converted(tmp_path).read_bytes()
    shutil.copytree(tmp_path / "packed", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "source")
    shutil.rmtree(tmp_path / "packed")
    convert_to_gguf(tmp_path / "elsewhere", tmp_path / "new.gguf", name="tiny", lineage={"a": "ü", "b": 1})
    assert (tmp_path / "new.gguf").read_bytes() == first
