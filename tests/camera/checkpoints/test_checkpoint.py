import json
from pathlib import Path
from typing import Any

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.checkpoints.tokenizer import load_tokenizer
from camera.checkpoints.weights import INDEX_NAME, SINGLE_NAME
from camera.errors import CameraError
from tests.tiny import MODEL_TYPES, TOKENS, tiny_checkpoint


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def without(folder: Path, name: str) -> None:
    tensors = {key: value.clone() for key, value in read_tensors(folder / SINGLE_NAME).items() if key != name}
    write_tensors(folder / SINGLE_NAME, tensors)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_checkpoint_opens_and_agrees_with_its_config(tmp_path: Path, model_type: str, shards: int) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, model_type, shards=shards, layers=3, ffn=172))
    checkpoint.check_shapes()
    assert checkpoint.family.model_type == model_type
    assert (checkpoint.layer_count, checkpoint.hidden_size, checkpoint.ffn_width) == (3, 64, 172)
    assert len(checkpoint.weight_files) == shards
    assert checkpoint.dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_lazy_reader_gives_the_tensors_that_transformers_loads(
    tmp_path: Path, model_type: str, tied: bool
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, model_type, tied=tied, shards=2))
    checkpoint.check_shapes()
    state = checkpoint.load_model().state_dict()
    assert set(checkpoint.needed) == set(state) - ({"lm_head.weight"} if tied else set())
    for name in checkpoint.needed:
        assert torch.equal(checkpoint.read(name), state[name])
        assert checkpoint.tensors[name].shape == tuple(state[name].shape)


def test_buffers_that_no_loader_needs_are_listed_and_not_needed(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, "PanguEmbedded"))
    ignored = set(checkpoint.tensors) - set(checkpoint.needed)
    assert ignored == {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)}
    assert not ignored & set(checkpoint.layer_tensors(0))


def test_the_tensors_of_layer_1_are_not_those_of_layer_10(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, layers=12, hidden=16, ffn=32))
    assert len(checkpoint.layer_tensors(1)) == 9
    assert len(checkpoint.layer_tensors(11)) == 9
    assert checkpoint.layer_tensors(12) == []


@pytest.mark.parametrize("biased", [True, False, None])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_family_knows_which_projections_carry_a_bias(
    tmp_path: Path, model_type: str, biased: bool | None
) -> None:
    folder = tiny_checkpoint(tmp_path, model_type)
    key = "bias" if model_type == "PanguEmbedded" else "attention_bias"
    edit(folder / "config.json", **{key: biased})
    checkpoint = Checkpoint.open(folder)
    built = checkpoint.empty_model().state_dict()
    assert checkpoint.family.names(checkpoint.config).keys() == built.keys()
    assert checkpoint.family.architecture == type(checkpoint.empty_model()).__name__


def test_opening_reads_no_weights(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    data = bytearray((folder / SINGLE_NAME).read_bytes())
    data[-1000:] = b"\xff" * 1000  # NaN everywhere: only reading finds out
    (folder / SINGLE_NAME).write_bytes(data)
    checkpoint = Checkpoint.open(folder)
    last = list(checkpoint.tensors)[-1]
    checkpoint.read(last)
    with pytest.raises(CameraError, match=f"{last} holds NaN or infinity"):
        checkpoint.read_finite(last)


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path))
    before = (tmp_path / SINGLE_NAME).read_bytes()
    checkpoint.read("model.norm.weight").fill_(7)
    assert (tmp_path / SINGLE_NAME).read_bytes() == before
    assert not (checkpoint.read("model.norm.weight") == 7).any()


def test_side_files_are_all_but_weights_index_and_hidden_files(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "PanguEmbedded", shards=2)
    for name in (
        "LICENSE",
        "modeling.py",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "x.gguf",
        "extra.safetensors",
        ".gitattributes",
    ):
        (folder / name).write_bytes(b"")
    (folder / "figures").mkdir()
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.side_files == [
        "LICENSE",
        "config.json",
        "generation_config.json",
        "modeling.py",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert checkpoint.tokenizer_files == ["tokenizer.model", "tokenizer_config.json"]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_tokenizer_loads_and_its_ids_fit_the_embedding(tmp_path: Path, model_type: str) -> None:
    tokenizer = Checkpoint.open(tiny_checkpoint(tmp_path, model_type, vocab=400)).load_tokenizer()
    ids = tokenizer("The lighthouse keeper counted 12 ships.")["input_ids"]
    assert len(ids) > 5
    assert max(ids) < TOKENS


# What it refuses


def test_a_path_that_is_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CameraError, match=f"{tmp_path / 'nowhere'} is not a folder"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CameraError, match=r"config\.json is missing"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "\udcff", "[" * 100_000])
def test_a_config_that_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CameraError, match=r"config\.json is not valid JSON"):
        Checkpoint.open(tmp_path)


def test_a_config_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(
        CameraError, match=r"config\.json' does not hold a JSON object|config\.json does not hold"
    ):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("model_type", ["gpt2", "mamba", None, 7])
def test_an_unsupported_family_is_named_beside_those_that_are(tmp_path: Path, model_type: object) -> None:
    folder = tiny_checkpoint(tmp_path)
    edit(folder / "config.json", model_type=model_type)
    with pytest.raises(
        CameraError,
        match=rf"config\.json: model_type {model_type!r} is not supported; .*PanguEmbedded.*qwen3",
    ):
        Checkpoint.open(folder)


def test_weights_in_another_format_are_refused_with_advice(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    (folder / SINGLE_NAME).rename(folder / "pytorch_model.bin")
    with pytest.raises(CameraError, match="only safetensors are read, no pickles"):
        Checkpoint.open(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CameraError, match=r"model-00002-of-00003\.safetensors is missing"):
        Checkpoint.open(folder)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, shards=3)
    shard = folder / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CameraError, match=r"model-00003-of-00003\.safetensors.*truncated"):
        Checkpoint.open(folder)


def test_a_shard_with_a_garbage_header_is_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    data = bytearray((folder / SINGLE_NAME).read_bytes())
    data[8:40] = b"\xfe" * 32
    (folder / SINGLE_NAME).write_bytes(data)
    with pytest.raises(CameraError, match=rf"{SINGLE_NAME} has no readable safetensors header"):
        Checkpoint.open(folder)


def test_a_shard_that_shrinks_after_opening_is_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    checkpoint = Checkpoint.open(folder)
    (folder / SINGLE_NAME).write_bytes(b"")
    with pytest.raises(CameraError, match=rf"{SINGLE_NAME} cannot be read \(model\.norm\.weight\)"):
        checkpoint.read("model.norm.weight")


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CameraError, match=r"has no tensor model\.layers\.9"):
        Checkpoint.open(tiny_checkpoint(tmp_path)).read("model.layers.9.mlp.up_proj.weight")


def test_an_index_that_places_a_tensor_in_the_wrong_file_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, shards=2)
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["model.embed_tokens.weight"] = "model-00002-of-00002.safetensors"
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(
        CameraError, match=r"model-00002-of-00002\.safetensors does not hold model\.embed_tokens\.weight"
    ):
        Checkpoint.open(folder)


def test_an_index_that_promises_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, shards=2)
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["model.extra"] = "model-00001-of-00002.safetensors"
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CameraError, match=r"does not hold model\.extra"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/model.safetensors", "sub/m.safetensors", "..", ".", ""]
)
def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path, file: str) -> None:
    folder = tiny_checkpoint(tmp_path / "model", shards=2)
    write_tensors(tmp_path / SINGLE_NAME, {"model.extra": torch.ones(1)})
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["model.extra"] = file
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CameraError, match=rf"{INDEX_NAME} names '{file}', which is outside its folder"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "index", [[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": []}}, None]
)
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, index: object) -> None:
    folder = tiny_checkpoint(tmp_path, shards=2)
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CameraError, match="has no weight_map"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        (
            "intermediate_size",
            128,
            "mlp.gate_proj.weight has shape [192, 64] and config.json asks for [128, 64]",
        ),
        (
            "hidden_size",
            32,
            "model.embed_tokens.weight has shape [352, 64] and config.json asks for [352, 32]",
        ),
        (
            "vocab_size",
            400,
            "model.embed_tokens.weight has shape [352, 64] and config.json asks for [400, 64]",
        ),
        ("num_key_value_heads", 4, "self_attn.k_proj.weight has shape [32, 64]"),
        ("num_hidden_layers", 3, "model.layers.2.input_layernorm.weight is missing"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused_with_the_first_tensor(
    tmp_path: Path, key: str, value: int, named: str
) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen2")
    edit(folder / "config.json", **{key: value, "layer_types": None})
    with pytest.raises(CameraError) as raised:
        Checkpoint.open(folder).check_shapes()
    assert named in str(raised.value)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    folder = tiny_checkpoint(tmp_path)
    without(folder, name)
    with pytest.raises(CameraError, match=f"{name} is missing"):
        Checkpoint.open(folder).check_shapes()


def test_a_missing_bias_of_pangu_is_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "PanguEmbedded")
    without(folder, "model.layers.1.self_attn.o_proj.bias")
    with pytest.raises(CameraError, match=r"model\.layers\.1\.self_attn\.o_proj\.bias is missing"):
        Checkpoint.open(folder).check_shapes()


def test_a_checkpoint_without_feed_forward_matrices_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    without(folder, "model.layers.0.mlp.gate_proj.weight")
    with pytest.raises(CameraError, match=r"no tensor model\.layers\.0\.mlp\.gate_proj\.weight"):
        Checkpoint.open(folder).check_shapes()


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "intermediate_size"])
@pytest.mark.parametrize("value", [None, "many", -1, 0, 2.5, True])
def test_a_size_that_is_no_positive_integer_is_named(tmp_path: Path, key: str, value: object) -> None:
    folder = tiny_checkpoint(tmp_path)
    edit(folder / "config.json", **{key: value})
    with pytest.raises(CameraError, match=rf"config\.json: {key} is {value!r}, not a positive integer"):
        _ = Checkpoint.open(folder).ffn_width


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 5),
        ("hidden_act", "nope"),
        ("head_dim", 7),
        ("rope_parameters", {"rope_type": "nope"}),
    ],
)
def test_a_config_that_transformers_refuses_is_named(tmp_path: Path, key: str, value: object) -> None:
    folder = tiny_checkpoint(tmp_path)
    edit(folder / "config.json", **{key: value})
    with pytest.raises(
        CameraError, match=r"config\.json (is refused by|describes no model that) transformers"
    ):
        Checkpoint.open(folder).check_shapes()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    edit(folder / "config.json", vocab_size=100)
    with pytest.raises(CameraError, match="352 tokens and the embedding 100 rows"):
        Checkpoint.open(folder).load_tokenizer()


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    for name in Checkpoint.open(folder).tokenizer_files:
        (folder / name).unlink()
    with pytest.raises(CameraError, match=f"{folder}: the tokenizer cannot be loaded"):
        Checkpoint.open(folder).load_tokenizer()


def test_a_single_file_wins_over_an_index_as_transformers_has_it(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", shards=2)
    tiny_checkpoint(tmp_path / "other", seed=1)
    (tmp_path / "other" / SINGLE_NAME).rename(folder / SINGLE_NAME)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.weight_files == [SINGLE_NAME]
    state = checkpoint.load_model().state_dict()
    assert all(torch.equal(checkpoint.read(name), state[name]) for name in checkpoint.needed)


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_biases_of_the_feed_forward_layers_are_refused_when_it_is_opened(
    tmp_path: Path, projection: str
) -> None:
    folder = tiny_checkpoint(tmp_path)
    name = f"model.layers.0.mlp.{projection}_proj.bias"
    tensors = {key: value.clone() for key, value in read_tensors(folder / SINGLE_NAME).items()}
    write_tensors(folder / SINGLE_NAME, {**tensors, name: torch.ones(192)})
    with pytest.raises(CameraError, match=f"has {name}: feed-forward layers with biases are not supported"):
        Checkpoint.open(folder)


def test_layers_beyond_those_of_the_config_are_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, layers=3)
    edit(folder / "config.json", num_hidden_layers=2, layer_types=None)
    with pytest.raises(CameraError, match=r"has model\.layers\.2\..*asks for 2 layers only"):
        Checkpoint.open(folder).check_shapes()


def test_the_tokenizer_of_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CameraError, match="nothing is not a folder: give the folder of a model"):
        load_tokenizer(tmp_path / "nothing")


def add_token(folder: Path, token: str, **config: Any) -> None:
    """Add a special token behind the last of a sentencepiece tokenizer."""
    added = {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {str(TOKENS): {**added, "special": True}}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=decoder, **config)


def test_an_added_token_without_a_row_may_stay_as_long_as_no_text_uses_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", vocab=TOKENS)
    add_token(folder, "[PAD]", pad_token="[PAD]")
    tokenizer = Checkpoint.open(folder).load_tokenizer()
    assert len(tokenizer) == TOKENS + 1
    assert "the tokenizer has '[PAD]', for which the embedding has no row" in caplog.text


def test_a_text_does_not_start_or_end_with_a_token_without_a_row(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", vocab=TOKENS)
    add_token(folder, "<|end|>", eos_token="<|end|>")
    with pytest.raises(CameraError, match=f"{TOKENS + 1} tokens and the embedding {TOKENS} rows"):
        Checkpoint.open(folder).load_tokenizer()
