"""`camera import`: a GGUF file becomes the Hugging Face folder that it could have been made from."""

import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from camera import import_gguf
from camera.checkpoints.checkpoint import Checkpoint
from camera.cli.stages import STAGES
from camera.digests import digest_files, files_below
from camera.errors import CameraError
from camera.files import read_json
from camera.formats import gguf_import
from camera.formats.convert import convert_to_gguf
from camera.formats.gguf_reader import hf_config, open_gguf, read_hf_tensor
from camera.formats.gguf_to_tokenizer import read_tokenizer
from camera.models import FAMILIES
from camera.options import BlockType, QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.tiny import ALWAYS_TIED, DENSE_TYPES, TOKENS, tiny_checkpoint, tiny_moe_checkpoint

ROWS = TOKENS + 32  # so that the vocabulary is padded
CONFIG = (
    *("model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype"),
)
TEXTS = (
    "The old lighthouse keeper, 12 ships & 345.",
    "  two  blanks\n\n\nlines\t",
    "naïve café 系统：你好。🙂",
    "don't WE'LL it's",
    "<|im_start|>user<|im_end|> [unused9] </s>",
    "",
)


def made(folder: Path, source: Path, type: BlockType = "f32", name: str = "made") -> Path:
    """A GGUF file of a checkpoint."""
    quantize_checkpoint(Checkpoint.open(source), folder / f"{name}-packed", QuantizeOptions(type=type))
    convert_to_gguf(folder / f"{name}-packed", folder / f"{name}.gguf", name="tiny")
    return folder / f"{name}.gguf"


def rewritten(path: Path, out: Path, without: tuple[str, ...] = (), **changes: Any) -> Path:
    """A copy of a file with other keys; `__` stands for a dot."""
    file = open_gguf(path)
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    writer = gguf.GGUFWriter(out, changed.pop("general.architecture", file.architecture))
    for key, value in {**file.metadata, **changed}.items():
        if key != "general.architecture" and key not in without:
            kind, items = file.value_types.get(key, (4, None))
            if isinstance(value, list):
                kind, items = 9, items if items is not None else 4
            writer.add_key_value(
                key, value, gguf.GGUFValueType(kind), None if items is None else gguf.GGUFValueType(items)
            )
    for tensor in file.tensors.values():
        kind = gguf.GGMLQuantizationType[tensor.type.upper()]
        writer.add_tensor(
            tensor.name, tensor.data if kind > 1 else file.dequantize(tensor.name).numpy(), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_a_checkpoint_comes_back_through_a_float32_file(tmp_path: Path, model_type: str) -> None:
    tied = model_type in ("qwen2", *ALWAYS_TIED)
    source = Checkpoint.open(tiny_checkpoint(tmp_path / "source", model_type, vocab=ROWS, tied=tied))
    report = import_gguf(made(tmp_path, source.folder), tmp_path / "back")
    back = Checkpoint.open(tmp_path / "back")
    assert back.tensors.keys() == source.needed.keys()
    for name in back.tensors:  # of Gemma's norms a file holds 1 + w, which takes their last digits
        atol = 1e-6 if model_type.startswith("gemma") and name.endswith("norm.weight") else 0
        torch.testing.assert_close(back.read(name), source.read(name), rtol=0, atol=atol)
    assert (report.dtype, report.rounded, report.rounding_error) == ("float32", 0, 0.0)
    ours, theirs = back.hf_config.to_dict(), source.hf_config.to_dict()
    if source.family.gguf_architecture == "llama":  # whose models the file does not tell apart
        theirs |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert {key: ours.get(key) for key in CONFIG} == {key: theirs.get(key) for key in CONFIG}
    tokens = torch.tensor([[1, 20, 300, 7, 45, 9, 11, 13, 17, 19, 23, 29]])
    with torch.no_grad():
        assert torch.equal(back.load_model()(tokens).logits, source.load_model()(tokens).logits)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_the_tokenizer_gives_the_ids_of_the_one_it_was_made_from(tmp_path: Path, model_type: str) -> None:
    source = Checkpoint.open(tiny_checkpoint(tmp_path / "source", model_type, vocab=ROWS))
    import_gguf(made(tmp_path, source.folder), tmp_path / "back")
    ours, theirs = Checkpoint.open(tmp_path / "back").load_tokenizer(), source.load_tokenizer()
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
    assert len(ours) == len(theirs) == TOKENS
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(ours, key) for key in special[1:]] == [getattr(theirs, key) for key in special[1:]]
    messages = [{"role": "user", "content": "hi"}]
    how = {"tokenize": False, "add_generation_prompt": True}
    assert ours.apply_chat_template(messages, **how) == theirs.apply_chat_template(messages, **how)


def test_a_second_import_of_what_was_imported_has_the_same_bytes(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen2", vocab=ROWS, tied=True)
    first = import_gguf(made(tmp_path, source, "q8_0"), tmp_path / "first")
    second = import_gguf(made(tmp_path, tmp_path / "first", name="again"), tmp_path / "second")
    of = {name: digest_files(tmp_path / name, files_below(tmp_path / name)) for name in ("first", "second")}
    for digests in of.values():
        del digests["import.json"], digests["README.md"]  # which name the file
    assert of["first"] == of["second"]
    assert first.sha256 != second.sha256


def test_the_record_says_what_the_folder_was_made_of(tmp_path: Path) -> None:
    path = made(tmp_path, tiny_checkpoint(tmp_path / "source"), "q4_0")
    report = import_gguf(path, tmp_path / "back")
    assert report == gguf_import.ImportReport.read(tmp_path / "back" / "import.json", "import again")
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.types == {"q4_0": 16, "f32": 5}
    assert "rounded to q4_0" in report.unknown[0]
    card = (tmp_path / "back" / "README.md").read_text()
    assert card.endswith("# tiny\n\nImported from the GGUF file `made.gguf` by `camera import`.\n")


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0, 2.1, 2.2, 2.3, 2.4, 2.5],
    "partial_rotary_factor": 0.75,
}


def stripped(folder: Path, model_type: str, rope: dict[str, Any], **more: Any) -> tuple[Path, Path]:
    """A model with such positions, and its GGUF file without our key, as other converters write it."""
    source = tiny_checkpoint(
        folder / "source", model_type, vocab=ROWS, rope_parameters={"rope_theta": 5e5, **rope}, **more
    )
    path = made(folder, source)
    assert "camera.rope_parameters" in open_gguf(path).metadata
    return source, rewritten(path, folder / "other.gguf", without=("camera.rope_parameters",))


@pytest.mark.parametrize(
    ("model_type", "rope", "length"),
    [
        ("llama", LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192}, 512),
        ("llama", LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}, 512),
        ("phi3", LONG, 8),  # the text is longer, so that the long factors turn it
        ("phi3", LONG, 256),
    ],
)
def test_rotary_factors_are_understood_without_our_key(
    tmp_path: Path, model_type: str, rope: dict[str, Any], length: int
) -> None:
    more = {"original_max_position_embeddings": length} if model_type == "phi3" else {}
    source, other = stripped(tmp_path, model_type, rope, **more)
    import_gguf(other, tmp_path / "back")
    ours, theirs = Checkpoint.open(tmp_path / "back"), Checkpoint.open(source)
    found = ours.hf_config.rope_parameters
    assert {key: found[key] for key in rope} == rope
    assert found["rope_theta"] == 5e5
    tokens = torch.tensor([[1, 20, 300, 7, 45, 9, 11, 13, 17, 19, 23, 29]])
    with torch.no_grad():
        assert torch.equal(ours.load_model()(tokens).logits, theirs.load_model()(tokens).logits)


def test_factors_of_one_are_plain_positions_and_strange_ones_are_refused(tmp_path: Path) -> None:
    ones = LLAMA3 | {"factor": 1.0, "original_max_position_embeddings": 8192}
    config = hf_config(open_gguf(stripped(tmp_path / "ones", "llama", ones)[1]))
    assert (config["rope_theta"], config.get("rope_scaling")) == (5e5, None)
    strange = LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 128}
    other = stripped(tmp_path / "strange", "llama", strange)[1]
    with pytest.raises(CameraError, match=r"rope_freqs\.weight are not those of Llama 3 .* take the Hugging"):
        import_gguf(other, tmp_path / "back")


def test_a_window_whose_length_is_left_out_is_llama_cpp_s(tmp_path: Path) -> None:
    path = made(tmp_path, tiny_checkpoint(tmp_path / "source", "gemma2", tied=True))
    other = rewritten(path, tmp_path / "other.gguf", without=("gemma2.attention.sliding_window",))
    config = hf_config(open_gguf(other))
    assert (config["sliding_window"], config["layer_types"]) == (
        4096, ["sliding_attention", "full_attention"],
    )  # fmt: skip
    window = FAMILIES["exaone4"].gguf_rules.window
    assert window is not None
    assert [window.assumed(layers) for layers in (30, 64)] == [0, 4096]


def test_texts_start_with_a_token_under_the_rules_that_say_so_in_llama_cpp(tmp_path: Path) -> None:
    path = made(tmp_path, tiny_checkpoint(tmp_path / "source", "qwen2"))
    begins = {}
    for rule in ("youtu", "llama-bpe", "tekken"):
        other = rewritten(
            path,
            tmp_path / f"{rule}.gguf",
            without=("tokenizer.ggml.add_bos_token",),
            tokenizer__ggml__pre=rule,
            tokenizer__ggml__bos_token_id=1,
        )
        begins[rule] = read_tokenizer(open_gguf(other)).files["tokenizer_config.json"]["add_bos_token"]
    assert begins == {"youtu": False, "llama-bpe": True, "tekken": True}


@pytest.mark.parametrize("type", ["Q4_1", "Q5_0", "Q6_K", "Q4_K", "IQ4_NL", "BF16"])
def test_types_of_other_tools_become_the_numbers_that_they_stand_for(tmp_path: Path, type: str) -> None:
    source = tiny_checkpoint(tmp_path / "source", hidden=256, ffn=256, layers=1, heads=4)
    path = made(tmp_path, source)
    kind, file = gguf.GGMLQuantizationType[type], open_gguf(path)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    for key, value in file.metadata.items():
        if key != "general.architecture":
            number, items = file.value_types[key]
            writer.add_key_value(
                key, value, gguf.GGUFValueType(number), None if items is None else gguf.GGUFValueType(items)
            )
    bytes_of = np.random.default_rng(0)
    for name, tensor in file.tensors.items():
        if len(tensor.shape) == 1:
            writer.add_tensor(name, file.dequantize(name).numpy())
            continue
        try:
            packed = gguf.quantize(file.dequantize(name).numpy(), kind)
        except NotImplementedError:  # which the library only reads: any small bytes are numbers
            length, size = gguf.GGML_QUANT_SIZES[kind]
            packed = bytes_of.integers(0, 8, (tensor.shape[0], tensor.shape[1] // length * size), np.uint8)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = import_gguf(tmp_path / "other.gguf", tmp_path / "back")
    back, other = Checkpoint.open(tmp_path / "back"), open_gguf(tmp_path / "other.gguf")
    assert report.dtype == "float32"  # BF16 too, as its norms are of more digits
    for name in back.tensors:
        assert torch.equal(back.read(name), read_hf_tensor(other, name)), name


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])  # of Gemma's norms the file holds 1 + w
def test_the_file_s_own_float_type_is_kept_where_it_holds_every_number(
    tmp_path: Path, model_type: str
) -> None:
    tied = model_type in ALWAYS_TIED
    source = Checkpoint.open(
        tiny_checkpoint(tmp_path / "source", model_type, tied=tied, dtype=torch.bfloat16)
    )
    report = import_gguf(made(tmp_path, source.folder, "bf16"), tmp_path / "back")
    back = Checkpoint.open(tmp_path / "back")
    assert (report.dtype, report.rounded, back.config["dtype"]) == ("bfloat16", 0, "bfloat16")
    assert all(torch.equal(back.read(name), source.read(name)) for name in back.tensors)


def test_a_dtype_that_loses_digits_says_how_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made(tmp_path, tiny_checkpoint(tmp_path / "source"))
    report = import_gguf(path, tmp_path / "back", dtype="bfloat16")
    back, file = Checkpoint.open(tmp_path / "back"), open_gguf(path)
    exact = {name: read_hf_tensor(file, name) for name in back.tensors}
    assert report.rounded == len(exact)
    noise = sum(float((back.read(name).float() - tensor).square().sum()) for name, tensor in exact.items())
    power = sum(float(tensor.square().sum()) for tensor in exact.values())
    assert report.rounding_error == pytest.approx((noise / power) ** 0.5, rel=1e-4)
    show = next(stage.show for stage in STAGES if stage.name == "import")
    show(report.model_copy(update={"rounding_error": 0.000193}), {"out": tmp_path / "back"})
    assert "bfloat16 rounds: 0.019 % of their RMS" in "".join(capsys.readouterr())


def test_weights_go_into_shards_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_import, "SHARD_BYTES", 200_000)
    path = made(tmp_path, tiny_checkpoint(tmp_path / "source"))
    seen: list[tuple[int, int]] = []
    import_gguf(path, tmp_path / "back", progress=lambda done, total: seen.append((done, total)))
    back = Checkpoint.open(tmp_path / "back")
    assert len(back.weight_files) > 2
    assert all((back.folder / file).stat().st_size < 210_000 for file in back.weight_files)
    assert read_json(back.folder / "model.safetensors.index.json")["metadata"]["total_size"] == sum(
        info.size_bytes for info in back.tensors.values()
    )
    assert seen[-1] == (len(back.tensors), len(back.tensors))


def test_a_mixture_of_experts_is_imported_matrix_by_matrix(tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "source", dtype=torch.bfloat16))
    import_gguf(made(tmp_path, source.folder, "bf16"), tmp_path / "back")
    back = Checkpoint.open(tmp_path / "back")
    assert all(torch.equal(back.read(name).float(), source.read(name).float()) for name in source.needed)


def test_further_ends_and_sampling_stand_in_the_generation_config(tmp_path: Path) -> None:
    path = made(tmp_path, tiny_checkpoint(tmp_path / "source"))
    changed = rewritten(
        path, tmp_path / "other.gguf", tokenizer__ggml__eot_token_id=4, general__sampling__top_k=20
    )
    import_gguf(changed, tmp_path / "back")
    found = read_json(tmp_path / "back" / "generation_config.json")
    assert found == {
        "bos_token_id": 1, "eos_token_id": [2, 4], "pad_token_id": 0, "do_sample": True, "top_k": 20,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general__architecture": "mamba"}, "architecture 'mamba' is not supported; supported are"),
        ({"llama__feed_forward_length": [192, 128]}, "differs from layer to layer"),
        ({"llama__feed_forward_length": 128}, "has shape .*layers that differ"),
        ({"tokenizer__ggml__model": "bert"}, "of the kind 'bert' cannot be written"),
        ({"tokenizer__ggml__eos_token_id": 9999}, "eos_token_id is 9999, and there are"),
    ],
)
def test_what_cannot_be_a_folder_is_refused_and_leaves_none(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    path = made(tmp_path, tiny_checkpoint(tmp_path / "source"))
    before = set(tmp_path.iterdir())
    with pytest.raises(CameraError, match=words):
        import_gguf(rewritten(path, tmp_path / "other.gguf", **changes), tmp_path / "back")
    assert set(tmp_path.iterdir()) - before == {tmp_path / "other.gguf"}


def test_a_splitting_rule_without_a_name_here_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path, tiny_checkpoint(tmp_path / "source", "qwen2"))
    changed = rewritten(path, tmp_path / "other.gguf", tokenizer__ggml__pre="of-tomorrow")
    with pytest.raises(CameraError, match="rule 'of-tomorrow', which is not known"):
        import_gguf(changed, tmp_path / "back")


def test_a_truncated_file_and_one_that_lacks_a_tensor_are_refused(tmp_path: Path) -> None:
    path = made(tmp_path, tiny_checkpoint(tmp_path / "source"))
    (tmp_path / "short.gguf").write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CameraError, match="truncated, fetch or write it again"):
        import_gguf(tmp_path / "short.gguf", tmp_path / "back")
    (tmp_path / "less.gguf").write_bytes(path.read_bytes().replace(b"blk.1.ffn_norm", b"blk.9.ffn_norm"))
    with pytest.raises(CameraError, match=r"no tensor for model\.layers\.1\.post_attention_layernorm.weight"):
        import_gguf(tmp_path / "less.gguf", tmp_path / "back")
    assert not (tmp_path / "back").exists()
