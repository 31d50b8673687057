import struct
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.formats.convert import convert_to_gguf
from camera.formats.gguf_reader import GgufFile, hf_config, hf_names, open_gguf, read_hf_tensor
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.tiny import tiny_checkpoint, tiny_moe_checkpoint

Q = gguf.GGMLQuantizationType
Kind = gguf.GGUFValueType


@pytest.fixture
def writer(tmp_path: Path) -> gguf.GGUFWriter:
    return gguf.GGUFWriter(tmp_path / "stock.gguf", "llama")


def finish(writer: gguf.GGUFWriter) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert writer.path is not None
    return writer.path


def head(tensors: int, keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def tensor_line(
    name: str = "t",
    shape: tuple[int, ...] = (4,),
    type: int = 0,
    offset: int = 0,
    dimensions: int | None = None,
) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    count = struct.pack("<I", len(shape) if dimensions is None else dimensions)
    return text(name) + count + sizes + struct.pack("<IQ", type, offset)


@cache
def tiny_file(model_type: str = "llama") -> bytes:
    """A whole file of ours: a model, a tokenizer and every key."""
    with TemporaryDirectory() as folder:
        if model_type == "llama":
            source = Checkpoint.open(tiny_checkpoint(Path(folder) / "source", layers=1))
        else:
            source = Checkpoint.open(tiny_moe_checkpoint(Path(folder) / "source", model_type, layers=2))
        quantize_checkpoint(source, Path(folder) / "packed", QuantizeOptions(type="q4_0_64"))
        convert_to_gguf(Path(folder) / "packed", Path(folder) / "tiny.gguf", name="tiny")
        return (Path(folder) / "tiny.gguf").read_bytes()


def use_everything(file: GgufFile) -> None:
    """What a reader of models does with a file."""
    hf_config(file)
    for name in hf_names(file):
        read_hf_tensor(file, name)
    for name in file.tensors:
        file.dequantize(name)


def test_every_kind_of_key_of_a_stock_file_is_read(writer: gguf.GGUFWriter) -> None:
    values = {
        "u8": (255, Kind.UINT8),
        "i8": (-128, Kind.INT8),
        "u16": (65535, Kind.UINT16),
        "i16": (-32768, Kind.INT16),
        "u32": (2**32 - 1, Kind.UINT32),
        "i32": (-(2**31), Kind.INT32),
        "u64": (2**64 - 1, Kind.UINT64),
        "i64": (-(2**63), Kind.INT64),
        "f32": (0.5, Kind.FLOAT32),
        "f64": (0.1, Kind.FLOAT64),
        "yes": (True, Kind.BOOL),
        "no": (False, Kind.BOOL),
        "text": ("naïve 系统", Kind.STRING),
        "numbers": ([1, 2, 3], Kind.ARRAY),
        "floats": ([0.5, 0.25], Kind.ARRAY),
        "flags": ([True, False], Kind.ARRAY),
        "texts": (["a", "", "ü"], Kind.ARRAY),
    }
    for key, (value, kind) in values.items():
        writer.add_key_value(key, value, kind)
    metadata = open_gguf(finish(writer)).metadata
    assert metadata == {"general.architecture": "llama", **{key: value for key, (value, _) in values.items()}}
    assert [type(metadata[key]) for key in ("yes", "u8", "f32", "text")] == [bool, int, float, str]


@pytest.mark.parametrize("type", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q5_1, Q.TQ2_0])
def test_tensors_of_stock_types_give_their_numbers(writer: gguf.GGUFWriter, type: Q) -> None:
    weight = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    packed = gguf.quantize(weight, type)
    writer.add_tensor("w", packed, raw_dtype=type)
    file = open_gguf(finish(writer))
    assert (file.tensors["w"].type, file.tensors["w"].shape) == (type.name.lower(), (3, 256))
    assert torch.equal(file.dequantize("w"), torch.from_numpy(gguf.dequantize(packed, type).reshape(3, 256)))


def test_another_alignment_is_followed(writer: gguf.GGUFWriter) -> None:
    writer.add_custom_alignment(256)
    for name in "ab":
        writer.add_tensor(name, np.full((1, 5), ord(name), np.float32))
    file = open_gguf(finish(writer))
    assert file.dequantize("b").tolist() == [[98.0] * 5]


def test_type_40_without_our_key_is_taken_for_nvfp4_and_refused(tmp_path: Path) -> None:
    content = tiny_file()
    path = tmp_path / "foreign.gguf"
    path.write_bytes(content.replace(b"camera.q4_0_64.layout", b"camera.q4_0_64.lay0ut"))
    with pytest.raises(CameraError, match=r"type 40.*NVFP4"):
        open_gguf(path)


def test_type_40_of_another_layout_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.gguf"
    path.write_bytes(tiny_file().replace(b"nibbles=offset8", b"nibbles=signed4"))
    with pytest.raises(CameraError, match=r"type 40"):
        open_gguf(path)


def test_a_type_that_cannot_become_numbers_is_named(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("w", np.zeros((1, 24), np.int32))
    file = open_gguf(finish(writer))
    with pytest.raises(CameraError, match="w is i32"):
        file.dequantize("w")


def test_a_missing_tensor_is_named(writer: gguf.GGUFWriter) -> None:
    with pytest.raises(CameraError, match=r"stock\.gguf has no tensor q"):
        open_gguf(finish(writer)).dequantize("q")


def test_a_file_without_a_model_s_keys_says_which_is_missing(writer: gguf.GGUFWriter) -> None:
    with pytest.raises(CameraError, match=r"no key llama\.embedding_length"):
        hf_config(open_gguf(finish(writer)))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    with pytest.raises(CameraError, match=r"'mamba' is not supported"):
        hf_config(open_gguf(finish(writer)))


def test_widths_that_differ_by_layer_are_refused(writer: gguf.GGUFWriter) -> None:
    for key in ("embedding_length", "attention.head_count", "block_count", "context_length"):
        writer.add_uint32(f"llama.{key}", 1)
    writer.add_array("llama.feed_forward_length", [64, 128])
    writer.add_tensor("token_embd.weight", np.zeros((4, 1), np.float32))
    with pytest.raises(CameraError, match="differs from layer to layer"):
        hf_config(open_gguf(finish(writer)))


DAMAGED = {
    "not GGUF": (b"GGML" + bytes(40), "no GGUF file"),
    "nothing": (b"", "empty"),
    "two bytes": (b"GG", "truncated or damaged"),
    "version 1": (head(0, 0, version=1), "version 1"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "2^63 tensors": (head(2**63, 0), "tensors are promised"),
    "2^64 keys": (head(0, 2**64 - 1), "keys are promised"),
    "a key longer than the file": (head(0, 1, struct.pack("<Q", 2**40) + bytes(64)), "bytes of a string"),
    "an unknown kind of key": (head(0, 1, text("k") + struct.pack("<I", 99) + bytes(8)), "unknown type 99"),
    "an endless array": (
        head(0, 1, text("k") + struct.pack("<IIQ", 9, 0, 2**50)),
        "array items are promised",
    ),
    "an array of unknown things": (
        head(0, 1, text("k") + struct.pack("<IIQ", 9, 77, 1) + bytes(8)),
        "type 77",
    ),
    "arrays in arrays": (
        head(0, 1, text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100),
        "depth",
    ),
    "a key twice": (head(0, 2, (text("k") + struct.pack("<IB", 0, 1)) * 2), "key k is there twice"),
    "a key that is no text": (head(0, 1, text(b"\xff\xfe") + struct.pack("<IB", 0, 1)), "not UTF-8"),
    "a tensor twice": (head(2, 0, tensor_line() * 2 + bytes(64)), "tensor t is there twice"),
    "nine dimensions": (head(1, 0, tensor_line(dimensions=9) + bytes(99)), "9 dimensions"),
    "a dimension of zero": (head(1, 0, tensor_line(shape=(0, 4)) + bytes(99)), "shape"),
    "a shape beyond the file": (head(1, 0, tensor_line(shape=(2**62, 2**62)) + bytes(64)), "truncated"),
    "an offset beyond the file": (head(1, 0, tensor_line(offset=2**62) + bytes(64)), "truncated"),
    "an offset out of step": (head(1, 0, tensor_line(offset=3) + bytes(99)), "not aligned"),
    "half a block": (head(1, 0, tensor_line(shape=(33, 2), type=2) + bytes(99)), "blocks of 32"),
    "a type of the future": (head(1, 0, tensor_line(type=4711) + bytes(99)), "type 4711"),
    "alignment 24": (
        head(0, 1, text("general.alignment") + struct.pack("<II", 4, 24)),
        "general.alignment is 24",
    ),
    "alignment as text": (
        head(0, 1, text("general.alignment") + struct.pack("<I", 8) + text("x")),
        "general.alignment is 'x'",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_file_that_lies_is_refused_with_its_path(tmp_path: Path, what: str) -> None:
    content, message = DAMAGED[what]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CameraError, match=message) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CameraError, match="is missing"):
        open_gguf(tmp_path / "no.gguf")
    with pytest.raises(CameraError, match="cannot be read"):
        open_gguf(tmp_path)


@settings(deadline=None, max_examples=60)
@given(part=st.floats(0, 0.9999))
def test_a_truncated_file_is_refused_wherever_it_ends(part: float) -> None:
    content = tiny_file()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "cut.gguf"
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(CameraError, match=r"cut\.gguf"):
            use_everything(open_gguf(path))


WRONG_KEYS = {
    "llama.embedding_length": "sixty-four",
    "llama.block_count": 10**9,
    "llama.feed_forward_length": [],
    "llama.attention.head_count": 0,
    "llama.attention.head_count_kv": -1,
    "llama.attention.key_length": 0.5,
    "llama.attention.layer_norm_rms_epsilon": float("nan"),
    "llama.rope.freq_base": "ten thousand",
    "llama.rope.scaling.type": "ntk",
    "llama.context_length": True,
    "tokenizer.ggml.eos_token_id": [1, 2],
    "general.architecture": 7,
}


@pytest.mark.parametrize("key", WRONG_KEYS)
def test_a_key_of_the_wrong_kind_is_refused_by_its_name(tmp_path: Path, key: str) -> None:
    (tmp_path / "tiny.gguf").write_bytes(tiny_file())
    file = open_gguf(tmp_path / "tiny.gguf")
    wrong = replace(file, metadata={**file.metadata, key: WRONG_KEYS[key]})
    with pytest.raises(CameraError, match=r"tiny\.gguf.*(llama|tokenizer|general|rope|attention)"):
        hf_config(wrong)


WRONG_KEYS_OF_EXPERTS = {
    "expert_count": 10**9,
    "expert_used_count": 0,
    "expert_feed_forward_length": [96, 96],
    "expert_shared_count": -1,
    "leading_dense_block_count": "one",
    "expert_weights_scale": float("inf"),
    "expert_weights_norm": 2,
    "attention.kv_lora_rank": 0.5,
    "attention.key_length_mla": 3,
    "nextn_predict_layers": 99,
}


@pytest.mark.parametrize("key", WRONG_KEYS_OF_EXPERTS)
def test_a_wrong_key_of_experts_is_refused_by_its_name(tmp_path: Path, key: str) -> None:
    (tmp_path / "tiny.gguf").write_bytes(tiny_file("deepseek_v3"))
    file = open_gguf(tmp_path / "tiny.gguf")
    wrong = replace(file, metadata={**file.metadata, f"deepseek2.{key}": WRONG_KEYS_OF_EXPERTS[key]})
    with pytest.raises(CameraError, match=r"deepseek2|key_length_mla"):
        hf_config(wrong)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "ernie4_5_moe"])
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_flipped_bytes_never_raise_anything_but_a_camera_error(model_type: str, data: st.DataObject) -> None:
    content = bytearray(tiny_file(model_type))
    tokens = content.index(b"tokenizer.ggml.tokens")
    infos = content.index(b"token_embd.weight")
    places = st.integers(0, tokens + 64) | st.integers(infos - 64, infos + 1900)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255) | st.just(content[place] ^ 0x80))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "flipped.gguf"
        path.write_bytes(content)
        with suppress(CameraError), np.errstate(all="ignore"):
            use_everything(open_gguf(path))
