"""What a family's file says of its weights is what transformers builds and llama.cpp's library names."""

from pathlib import Path

import gguf
import pytest
from transformers import CONFIG_MAPPING

from camera.checkpoints.checkpoint import Checkpoint
from camera.formats.rope import rope_parameters
from camera.models import FAMILIES, named_weights
from camera.models.block import FEED_FORWARD
from camera.models.defaults import completed
from tests.tiny import ALWAYS_TIED, DENSE_TYPES, MODEL_TYPES, tiny_checkpoint


def test_every_family_has_tests() -> None:
    assert {name for name, family in FAMILIES.items() if family.experts is None} == set(DENSE_TYPES)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_what_is_left_unsaid_is_what_transformers_takes_it_for(model_type: str) -> None:
    family = FAMILIES[model_type]
    family.register()
    whole = CONFIG_MAPPING[model_type]().to_dict()
    brief = {
        key: value for key, value in whole.items() if key not in ("rope_parameters", "tie_word_embeddings")
    }
    known = completed(family, brief, "config.json", 1000)
    assert known.get("tie_word_embeddings", False) == whole["tie_word_embeddings"]
    if "rope_theta" in (rope := whole.get("rope_parameters", {})):
        assert rope_parameters(known)["rope_theta"] == rope["rope_theta"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_the_weights_are_those_of_the_model_with_its_shapes(
    tmp_path: Path, model_type: str, tied: bool
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "model", model_type, vocab=384, tied=tied))
    weights = checkpoint.family.names(checkpoint.config)
    assert weights.keys() == checkpoint.needed.keys()
    for name, placed in weights.items():
        shape = checkpoint.family.shape(checkpoint.config, placed.weight)
        assert shape == checkpoint.tensors[name].shape, name


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_the_gguf_names_are_llama_cpp_s(model_type: str) -> None:
    family = FAMILIES[model_type]
    number = next(
        number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf_architecture
    )
    names = gguf.get_tensor_name_map(number, 2)
    for name, placed in named_weights(family, {"num_hidden_layers": 2}).items():
        if placed.weight.role == "head" and model_type in ALWAYS_TIED:
            continue
        assert names.get_name(name, try_suffixes=(".weight", ".bias")) == placed.gguf


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_reads_one_input_stands_together_in_the_order_of_computing(model_type: str) -> None:
    assert FAMILIES[model_type].shared_inputs({}, 0) == (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_dense_layer_is_one_block_of_three_matrices(tmp_path: Path, model_type: str) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "model", model_type))
    (block,) = checkpoint.blocks(1)
    layer = checkpoint.empty_model().get_submodule("model.layers.1")
    assert [tuple(layer.get_submodule(block.linear(role)).weight.shape) for role in FEED_FORWARD] == [  # type: ignore[union-attr, arg-type]
        (192, 64),
        (192, 64),
        (64, 192),
    ]
    assert checkpoint.ffn_names(1) == block.names
    assert checkpoint.config[block.width_key] == checkpoint.ffn_width
