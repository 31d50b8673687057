"""Quantised models and GGUF files, against gguf's own code, ten lines of numpy, and transformers' layer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor

from camera.checkpoints.checkpoint import Checkpoint
from camera.data import calibration_windows
from camera.formats.gguf_reader import open_gguf
from camera.options import CalibrationOptions
from tests.real.checkpoint import PIECES, VOCABULARY, WIDTH
from tests.real.plain import LINEARS, embedded, gptq_rows, linear_inputs, q4, read, reader, unpack_q4
from tests.real.workshop import Done, Workshop

pytestmark = pytest.mark.real
Run = Callable[[str], Done]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MATRICES = (
    EMBEDDING,
    HEAD,
    *(f"model.layers.{layer}.{linear}.weight" for layer in (0, 1) for linear in LINEARS),
)
Q, DOWN = (f"model.layers.0.{linear}.weight" for linear in ("self_attn.q_proj", "mlp.down_proj"))
ROWS = slice(1000, 1003)


@pytest.fixture(scope="module")
def tokens_ST(workshop: Workshop) -> torch.Tensor:
    """The calibration windows."""
    options = CalibrationOptions(name="stdlib", samples=2, length=128)
    return calibration_windows(options, Checkpoint.open(workshop.model))


@pytest.fixture(scope="module")
def inputs(workshop: Workshop, tokens_ST: torch.Tensor) -> dict[str, torch.Tensor]:
    """What enters each linear layer of the first decoder layer, in float32."""
    source = reader(workshop.model)
    return linear_inputs(source, WIDTH, embedded(source, tokens_ST).float())


class Packed:
    """A folder of packed tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.report: dict[str, Any] = json.loads((folder / "quantized.json").read_text())
        self.records = {record["name"]: record for record in self.report["tensors"]}

    def data(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Bytes of a tensor's rows."""
        with safe_open(self.folder / self.records[name]["file"], "np") as file:
            return file.get_slice(name)[rows]

    def numbers(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """What they stand for."""
        record, data = self.records[name], self.data(name, rows)
        if record["type"] in ("q4_0", "q4_0_64"):
            return unpack_q4(data, 32 if record["type"] == "q4_0" else 64)
        return gguf.quants.dequantize(data, Type[record["type"].upper()])


def source_rows(model: Path, name: str, rows: slice = ROWS) -> np.ndarray:
    return read(model, name, rows).float().numpy()


def output_error(rows: np.ndarray, stored: np.ndarray, inputs_TI: torch.Tensor) -> float:
    """What rounding changes of the output, squared and summed over tokens."""
    change = torch.from_numpy(rows - stored).double() @ inputs_TI.double().T
    return float(change.square().sum())


def test_rows_of_every_matrix_are_rounded_to_the_nearest(run: Run, model: Path):
    packed = Packed(run("quantize").out)
    assert {packed.records[name]["type"] for name in MATRICES} == {"q4_0_64"}
    for name in MATRICES:
        assert np.array_equal(packed.data(name, ROWS), q4(source_rows(model, name), 64)), name
    norm = packed.data("model.norm.weight").view(np.float32)
    assert np.array_equal(norm[0], read(model, "model.norm.weight").float().numpy())
    bits = sum(8 * path.stat().st_size for path in packed.folder.glob("*.safetensors"))
    assert packed.report["bits_per_weight"] == pytest.approx(bits / packed.report["parameters"], rel=1e-3)


def test_the_gguf_file_holds_the_bytes_of_the_folder_and_its_twin_the_same_numbers(
    run: Run, workshop: Workshop
):
    packed = Packed(run("quantize").out)
    file, twin = open_gguf(run("convert").out), gguf.GGUFReader(workshop.path("twin"))
    by_name = {tensor.name: tensor for tensor in twin.tensors}
    assert len(by_name) == len(file.tensors) == len(packed.records)
    names = {EMBEDDING: "token_embd.weight", HEAD: "output.weight", DOWN: "blk.0.ffn_down.weight"}
    for name, theirs in names.items():
        ours = packed.data(name)
        assert by_name[theirs].tensor_type == Type.Q4_0
        if name == HEAD:  # has too many rows for an Ascend card
            assert file.tensors[theirs].type == "q4_0"
            assert np.array_equal(file.tensors[theirs].data[ROWS], by_name[theirs].data[ROWS])
        else:
            assert file.tensors[theirs].type == "q4_0_64"
            assert np.array_equal(file.tensors[theirs].data, ours)
        numbers = gguf.quants.dequantize(by_name[theirs].data[ROWS], Type.Q4_0)
        assert np.array_equal(numbers, unpack_q4(ours[ROWS], 64))


def test_the_gguf_file_holds_the_tokenizer_padded_to_the_embedding(run: Run, model: Path):
    tokens = open_gguf(run("convert").out).metadata["tokenizer.ggml.tokens"]
    pieces = SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    assert len(tokens) == VOCABULARY
    assert tokens[:PIECES] == [pieces.id_to_piece(number) for number in range(PIECES)]


def test_types_by_matrix_are_those_asked_for(run: Run, model: Path):
    packed = Packed(run("quantize-types").out)
    expected = {EMBEDDING: "q4_0", HEAD: "f16", "model.layers.0.mlp.up_proj.weight": "q8_0"}
    expected |= {
        "model.layers.1.mlp.down_proj.weight": "bf16",
        "model.layers.1.self_attn.k_proj.weight": "f32",
    }
    for name, type in expected.items():
        assert packed.records[name]["type"] == type
        theirs = gguf.quants.quantize(source_rows(model, name), Type[type.upper()])
        assert np.array_equal(packed.data(name, ROWS), theirs.view(np.uint8)), name


def test_the_importance_matrix_is_the_sum_of_squares_of_what_enters(
    run: Run, inputs: dict[str, torch.Tensor]
):
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(run("imatrix").out).tensors}
    for theirs, linear in (("attn_q", Q), ("attn_output", "o_proj"), ("ffn_up", "up"), ("ffn_down", DOWN)):
        linear = next(name for name in LINEARS if name in linear or linear in name)
        squares = (inputs[linear].double() ** 2).sum(0)
        found = torch.tensor(tensors[f"blk.0.{theirs}.weight.in_sum2"]).flatten().double()
        torch.testing.assert_close(found, squares, rtol=1e-3, atol=0)
        assert tensors[f"blk.0.{theirs}.weight.counts"] == len(inputs[linear])


def test_searched_scales_lose_less_by_the_importance_matrix(run: Run, model: Path):
    importance = {tensor.name: tensor.data for tensor in gguf.GGUFReader(run("imatrix").out).tensors}
    packed = Packed(run("quantize-search").out)
    for name, theirs in ((Q, "blk.0.attn_q"), (DOWN, "blk.0.ffn_down"), (HEAD, "output")):
        rows = source_rows(model, name)
        nearest = unpack_q4(q4(rows, 32), 32)
        weights = importance[f"{theirs}.weight.in_sum2"].reshape(1, -1, 32)
        searched_RB, nearest_RB = (
            ((rows - stored).reshape(len(rows), -1, 32) ** 2 * weights).sum(-1)
            for stored in (packed.numbers(name, ROWS), nearest)
        )
        assert (searched_RB <= nearest_RB * (1 + 1e-5)).all()
        assert searched_RB.sum() < 0.95 * nearest_RB.sum()


def test_the_model_is_no_larger_than_the_target_and_finer_where_it_may_be(run: Run):
    packed = Packed(run("quantize-target").out)
    bits = sum(8 * path.stat().st_size for path in packed.folder.glob("*.safetensors"))
    assert 4.6 < packed.report["bits_per_weight"] <= 5
    assert packed.report["bits_per_weight"] == pytest.approx(bits / packed.report["parameters"], rel=1e-3)
    assert len({packed.records[name]["type"] for name in MATRICES}) > 1


def test_compensated_rounding_loses_less_of_the_output(
    run: Run, model: Path, inputs: dict[str, torch.Tensor], tokens_ST: torch.Tensor
):
    packed = Packed(run("quantize-gptq").out)
    rows = source_rows(model, Q)
    nearest = output_error(rows, unpack_q4(q4(rows, 32), 32), inputs["self_attn.q_proj"])
    ours = output_error(rows, packed.numbers(Q, ROWS), inputs["self_attn.q_proj"])
    plain = output_error(rows, gptq_rows(rows, inputs["self_attn.q_proj"], 0.01), inputs["self_attn.q_proj"])
    assert ours < nearest / 2
    assert ours < 1.1 * plain
    # down: of what the rounded matrices before it put out
    source = reader(model)

    def stored(name: str) -> torch.Tensor:
        return torch.from_numpy(packed.numbers(name)) if name in MATRICES[2:8] else source(name)

    seen_TF = linear_inputs(stored, WIDTH, embedded(source, tokens_ST).float())["mlp.down_proj"]
    rows = source_rows(model, DOWN)
    nearest = output_error(rows, unpack_q4(q4(rows, 32), 32), seen_TF)
    assert output_error(rows, packed.numbers(DOWN, ROWS), seen_TF) < nearest / 2
