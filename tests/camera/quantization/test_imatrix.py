import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.formats.gguf_reader import open_gguf
from camera.models import named_weights
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from camera.quantization.imatrix import Imatrix, collect_imatrix, read_imatrix, write_imatrix
from tests.tiny import MODEL_TYPES, TOKENS, tiny_checkpoint, tiny_moe_checkpoint

TOKENS_ST = torch.randint(3, TOKENS, (6, 32), generator=torch.Generator().manual_seed(0))
OPTIONS = QuantizeOptions(method="search", device="cpu", batch_size=4)


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(tmp_path / "source", "llama"))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_it_is_the_sum_of_squares_of_every_matrixs_input_in_the_whole_model(
    tmp_path: Path, model_type: str
) -> None:
    tied = model_type == "qwen2"
    source = Checkpoint.open(tiny_checkpoint(tmp_path / "source", model_type, tied=tied))
    found = collect_imatrix(source, TOKENS_ST, OPTIONS)
    expected: dict[str, torch.Tensor] = {}
    model = source.load_model(torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            key = "model.embed_tokens.weight" if tied and name == "lm_head" else f"{name}.weight"

            def keep(_, inputs, key=key):  # type: ignore[no-untyped-def]
                expected[key] = inputs[0].double().square().sum((0, 1)).float()

            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(input_ids=TOKENS_ST)
    assert found.sums.keys() == expected.keys()
    for name, sums in expected.items():
        torch.testing.assert_close(found.sums[name], sums, rtol=1e-4, atol=1e-5)
        assert found.counts[name] == TOKENS_ST.numel()


def test_batches_do_not_change_it(source: Checkpoint) -> None:
    first, second = (
        collect_imatrix(source, TOKENS_ST, OPTIONS.model_copy(update={"batch_size": size})) for size in (1, 6)
    )
    for name, sums in first.sums.items():
        torch.testing.assert_close(second.sums[name], sums, rtol=1e-5, atol=1e-6)


def test_a_file_reads_back_as_it_was_written(tmp_path: Path, source: Checkpoint) -> None:
    made = collect_imatrix(source, TOKENS_ST, OPTIONS, datasets=("story.txt",))
    write_imatrix(tmp_path / "imatrix.gguf", made, source)
    read = read_imatrix(tmp_path / "imatrix.gguf", source)
    assert read.digest == made.digest
    assert (read.chunk_size, read.datasets) == (32, ("story.txt",))
    write_imatrix(tmp_path / "again.gguf", read, source)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "imatrix.gguf").read_bytes()


def test_the_file_is_laid_out_as_llama_cpp_reads_it(tmp_path: Path, source: Checkpoint) -> None:
    made = collect_imatrix(source, TOKENS_ST, OPTIONS)
    write_imatrix(tmp_path / "imatrix.gguf", made, source)
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == 6
    assert reader.fields["imatrix.chunk_size"].contents() == 32
    assert reader.fields["imatrix.chunk_count"].types == [gguf.GGUFValueType.UINT32]
    assert isinstance(reader.fields["imatrix.datasets"].contents(), list)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * (2 * 7 + 1)
    sums, counts = tensors["blk.1.ffn_down.weight.in_sum2"], tensors["blk.1.ffn_down.weight.counts"]
    assert (sums.tensor_type, counts.tensor_type) == (gguf.GGMLQuantizationType.F32,) * 2
    assert (list(sums.shape), list(counts.shape)) == ([192, 1], [1, 1])
    np.testing.assert_array_equal(
        np.asarray(sums.data).reshape(-1), made.sums["model.layers.1.mlp.down_proj.weight"].numpy()
    )
    assert float(counts.data.reshape(-1)[0]) == TOKENS_ST.numel()


def test_a_file_quantises_as_the_tokens_that_it_was_made_of(tmp_path: Path, source: Checkpoint) -> None:
    write_imatrix(
        tmp_path / "imatrix.gguf",
        collect_imatrix(source, TOKENS_ST, OPTIONS),
        source,
    )
    imatrix = read_imatrix(tmp_path / "imatrix.gguf", source)
    quantize_checkpoint(source, tmp_path / "a", OPTIONS, imatrix=imatrix)
    quantize_checkpoint(source, tmp_path / "b", OPTIONS, TOKENS_ST)
    for shard in sorted(path.name for path in (tmp_path / "a").glob("*.safetensors")):
        assert (tmp_path / "a" / shard).read_bytes() == (tmp_path / "b" / shard).read_bytes()


def write(path: Path, source: Checkpoint, **sums: torch.Tensor) -> Path:
    names = {name.replace("__", "."): each for name, each in sums.items()}
    imatrix = Imatrix(names, dict.fromkeys(names, 10), 5)
    write_imatrix(path, imatrix, source)
    return path


def test_a_file_of_another_model_is_refused(tmp_path: Path, source: Checkpoint) -> None:
    path = write(tmp_path / "x.gguf", source, lm_head__weight=torch.ones(65))
    with pytest.raises(CameraError, match=r"output\.weight has 65 columns and lm_head\.weight has 64"):
        read_imatrix(path, source)


def test_sums_that_cannot_be_are_refused(tmp_path: Path, source: Checkpoint) -> None:
    path = write(tmp_path / "x.gguf", source, lm_head__weight=-torch.ones(64))
    with pytest.raises(CameraError, match="is not a sum of squares"):
        read_imatrix(path, source)


def test_a_file_without_counts_is_refused(tmp_path: Path, source: Checkpoint) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_type("imatrix")
    writer.add_uint32("imatrix.chunk_size", 4)
    writer.add_tensor("output.weight.in_sum2", np.ones((1, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CameraError, match=r"no tensor output\.weight\.counts"):
        read_imatrix(tmp_path / "x.gguf", source)


def test_a_model_is_no_importance_matrix(tmp_path: Path, source: Checkpoint) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert open_gguf(tmp_path / "x.gguf").architecture == "llama"
    with pytest.raises(CameraError, match="holds no importance matrix"):
        read_imatrix(tmp_path / "x.gguf", source)


# The older format of llama-imatrix


def dat(path: Path, entries: dict[str, tuple[int, np.ndarray]], text: str | None = "calibration.txt") -> Path:
    """As llama-imatrix wrote it."""
    data = struct.pack("<i", len(entries))
    for name, (summed, numbers) in entries.items():
        data += struct.pack(f"<i{len(name)}sii", len(name), name.encode(), summed, numbers.size)
        data += np.asarray(numbers, "<f4").tobytes()
    if text is not None:
        data += struct.pack(f"<ii{len(text)}s", 6, len(text), text.encode())
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("text", ["calibration.txt", None])
def test_the_older_file_means_the_same_importance(
    tmp_path: Path, source: Checkpoint, text: str | None
) -> None:
    made = collect_imatrix(source, TOKENS_ST, OPTIONS)
    weights = named_weights(source.family, source.config)
    tokens, chunks = TOKENS_ST.numel(), 6
    entries = {
        weights[name].gguf: (chunks, sums.numpy() / tokens * chunks) for name, sums in made.sums.items()
    }
    read = read_imatrix(dat(tmp_path / "imatrix.dat", entries, text), source)
    assert read.datasets == (() if text is None else (text,))
    for name in made.sums:
        torch.testing.assert_close(read.importance(name), made.importance(name))


def test_the_older_file_holds_all_experts_of_a_layer_in_a_row(tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "moe", "qwen3_moe"))
    sums_EI = np.arange(8 * 64, dtype=np.float32).reshape(8, 64)
    read = read_imatrix(dat(tmp_path / "x.dat", {"blk.1.ffn_up_exps.weight": (2, sums_EI)}), source)
    found = read.importance("model.layers.1.mlp.experts.3.up_proj.weight")
    assert found is not None
    np.testing.assert_array_equal(found.numpy(), sums_EI[3] / 2)


@pytest.mark.parametrize("cut", [0, 3, 30, 100])
def test_an_older_file_that_is_cut_is_refused(tmp_path: Path, source: Checkpoint, cut: int) -> None:
    path = dat(tmp_path / "x.dat", {"output.weight": (1, np.ones(64))})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CameraError, match=r"x\.dat is no importance matrix: neither a GGUF file, nor whole"):
        read_imatrix(path, source)


def test_an_older_file_of_another_model_is_refused(tmp_path: Path, source: Checkpoint) -> None:
    path = dat(tmp_path / "x.dat", {"output.weight": (1, np.ones(128))})
    with pytest.raises(CameraError, match=r"output\.weight has 2 matrices.*another model"):
        read_imatrix(path, source)
