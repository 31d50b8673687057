import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.weights import INDEX_NAME
from camera.errors import CameraError
from camera.options import PruneOptions
from camera.pruning import model_writer
from camera.pruning.stages import save
from tests.camera.pruning import naive
from tests.camera.pruning.conftest import (
    KINDS,
    ONE_OF_EACH_FAMILY,
    PROPAGATIONS,
    PRUNE,
    Build,
    contents,
    logits,
    run_steps,
)
from tests.tiny import tiny_checkpoint

MASK = PRUNE.model_copy(update={"mode": "mask"})


@pytest.mark.parametrize("propagate", PROPAGATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_sliced_model_is_the_masked_model_and_the_one_pruned_by_hand(
    build: Build, tokens: torch.Tensor, tmp_path: Path, kind: str, propagate: str
) -> None:
    folder = build(**KINDS[kind])
    sliced = run_steps(folder, tokens, tmp_path / "sliced", propagate=propagate)
    masked = run_steps(folder, tokens, tmp_path / "masked", MASK, propagate=propagate)
    by_hand = Checkpoint.open(folder).load_model()
    width = Checkpoint.open(sliced.saved).ffn_width
    naive.prune_model(by_hand, tokens, PRUNE.reduce_ratio, width, propagate)

    held_out = torch.randint(0, 352, (2, 40), generator=torch.Generator().manual_seed(11))
    found = logits(sliced.saved, held_out)
    with torch.no_grad():
        expected = by_hand(held_out).logits
    torch.testing.assert_close(found, logits(masked.saved, held_out), rtol=0, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - logits(folder, held_out)).abs().max() > 0.01  # and it is another model than the source


@pytest.mark.parametrize("kind", ["llama, tied, 3 shards", "PanguEmbedded, 172 channels, 3 shards"])
def test_a_layer_that_lies_in_two_shards_stays_in_two_shards(
    build: Build, tokens: torch.Tensor, tmp_path: Path, kind: str
) -> None:
    source = Checkpoint.open(build(**KINDS[kind]))
    files = [
        {source.tensors[name].file for name in source.ffn_names(layer)}
        | {source.tensors[name].file for name in source.layer_tensors(layer)}
        for layer in range(3)
    ]
    assert any(len(names) > 1 for names in files)
    saved = Checkpoint.open(run_steps(source.folder, tokens, tmp_path).saved)
    assert list(saved.tensors) == list(source.tensors)
    assert [info.file for info in saved.tensors.values()] == [info.file for info in source.tensors.values()]


@pytest.mark.parametrize("propagate", PROPAGATIONS)
@pytest.mark.parametrize("mode", ["physical", "mask"])
@pytest.mark.parametrize("kind", ONE_OF_EACH_FAMILY)
def test_ratio_zero_gives_back_every_byte(
    build: Build, tokens: torch.Tensor, tmp_path: Path, kind: str, mode: str, propagate: str
) -> None:
    folder = build(**KINDS[kind])
    options = PruneOptions(ratio=0.0, mode=mode)  # type: ignore[arg-type]
    steps = run_steps(folder, tokens, tmp_path, options, propagate=propagate)
    assert contents(steps.saved) == contents(folder)


@pytest.mark.parametrize("options", [PruneOptions(ratio=0.0), MASK])
def test_config_and_index_keep_the_formatting_of_whoever_wrote_them(
    tokens: torch.Tensor, tmp_path: Path, options: PruneOptions
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", shards=2)
    for name in ("config.json", INDEX_NAME):
        value = json.loads((folder / name).read_text())
        value.setdefault("metadata", {})["total_parameters"] = 1
        (folder / name).write_text(json.dumps(value, separators=(",", ":")))
    saved = run_steps(folder, tokens, tmp_path / "work", options).saved
    for name in ("config.json", INDEX_NAME):
        assert (saved / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("kind", ONE_OF_EACH_FAMILY)
def test_mask_mode_keeps_the_bytes_of_config_and_index(
    build: Build, tokens: torch.Tensor, tmp_path: Path, kind: str
) -> None:
    folder = build(**KINDS[kind])
    before, after = contents(folder), contents(run_steps(folder, tokens, tmp_path, MASK).saved)
    assert set(before) == set(after)
    differing = {name for name in before if before[name] != after[name]}
    assert differing == {name for name in before if name.endswith(".safetensors")}


def test_only_the_width_changes_in_config_and_the_index_counts_the_bytes_that_stay(
    build: Build, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(**KINDS["PanguEmbedded, 172 channels, 3 shards"])
    saved = run_steps(folder, tokens, tmp_path).saved
    source_config = json.loads((folder / "config.json").read_text())
    config = json.loads((saved / "config.json").read_text())
    assert config == {**source_config, "intermediate_size": 124}
    assert list(config) == list(source_config)

    index = json.loads((saved / INDEX_NAME).read_text())
    assert index["weight_map"] == json.loads((folder / INDEX_NAME).read_text())["weight_map"]
    files = sorted(saved.glob("*.safetensors"))
    assert len(files) == 3
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for file in files for tensor in load_file(file).values()
    )


def test_tensors_that_pruning_does_not_touch_keep_their_bits(
    build: Build, tokens: torch.Tensor, tmp_path: Path
) -> None:
    source = Checkpoint.open(build(**KINDS["PanguEmbedded"]))
    saved = Checkpoint.open(run_steps(source.folder, tokens, tmp_path).saved)
    untouched = [name for name in source.tensors if ".mlp." not in name]
    assert any(name.endswith("inv_freq") for name in untouched)
    for name in untouched:
        assert torch.equal(saved.read(name), source.read(name))
    assert set(saved.tensors) == set(source.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["physical", "mask"])
def test_the_dtype_is_preserved(
    build: Build, tokens: torch.Tensor, tmp_path: Path, mode: str, dtype: torch.dtype
) -> None:
    folder = build(model_type="qwen3", dtype=dtype)
    steps = run_steps(folder, tokens, tmp_path, PRUNE.model_copy(update={"mode": mode}))
    saved = Checkpoint.open(steps.saved)
    assert {info.dtype for info in saved.tensors.values()} == {dtype}
    assert saved.load_model().dtype == dtype


@pytest.mark.parametrize("kind", ONE_OF_EACH_FAMILY)
def test_the_saved_folder_loads_in_transformers_without_remote_code(
    build: Build, tokens: torch.Tensor, tmp_path: Path, kind: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = build(**KINDS[kind])
    saved = run_steps(folder, tokens, tmp_path).saved
    Checkpoint.open(saved).family.register()
    model, report = AutoModelForCausalLM.from_pretrained(
        saved, trust_remote_code=False, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert model.model.layers[2].mlp.down_proj.weight.shape == (64, Checkpoint.open(saved).ffn_width)
    assert type(model).__name__ == Checkpoint.open(saved).family.architecture
    text = "The keeper counted 12 ships."
    before, after = (
        AutoTokenizer.from_pretrained(where, trust_remote_code=False)(text) for where in (folder, saved)
    )
    assert before["input_ids"] == after["input_ids"]


def test_a_saved_pangu_opens_as_a_plain_llama_with_attention_biases(
    build: Build, tokens: torch.Tensor, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    saved = run_steps(build(**KINDS["PanguEmbedded, 172 channels, 3 shards"]), tokens, tmp_path).saved
    config = json.loads((saved / "config.json").read_text())
    for key in ("model_type", "architectures", "auto_map", "bias"):
        config.pop(key)
    model = LlamaForCausalLM(LlamaConfig(**config, attention_bias=True, mlp_bias=False)).eval()
    tensors = {}
    for file in saved.glob("*.safetensors"):
        tensors |= {name: value for name, value in load_file(file).items() if "inv_freq" not in name}
    model.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, logits(saved, tokens))


def test_side_files_are_carried_and_other_weights_are_not(tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "PanguEmbedded", layers=2)
    carried = {
        "modeling_openpangu_dense.py": b"raise ImportError\n",
        "configuration_openpangu_dense.py": b"\n",
        "LICENSE": b"terms\n",
        "README.md": b"# card\n",
    }
    left = {
        "pytorch_model.bin": b"\x80",
        "consolidated.safetensors": b"\0",
        "model.gguf": b"GGUF",
        ".git": b"",
    }
    for name, data in {**carried, **left}.items():
        (folder / name).write_bytes(data)
    saved = contents(run_steps(folder, tokens, tmp_path / "work").saved)
    for name in (*carried, "generation_config.json", "tokenizer.model", "tokenizer_config.json"):
        assert saved[name] == (folder / name).read_bytes()
    assert not set(left) & set(saved)


def test_the_same_save_gives_the_same_bytes(build: Build, tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = build(**KINDS["PanguEmbedded, 172 channels, 3 shards"])
    steps = run_steps(folder, tokens, tmp_path / "a")
    (tmp_path / "again").mkdir()
    save(Checkpoint.open(folder), steps.pruned, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(steps.saved)


def test_a_checkpoint_of_symbolic_links_is_saved_as_files(
    build: Build, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(model_type="llama")
    blobs, links = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"  # as the hub's cache lays them out
    links.mkdir(parents=True)
    shutil.copytree(folder, blobs)
    for path in blobs.iterdir():
        (links / path.name).symlink_to(path)
    through_links = run_steps(links, tokens, tmp_path / "links").saved
    assert not any(path.is_symlink() for path in through_links.iterdir())
    assert contents(through_links) == contents(run_steps(folder, tokens, tmp_path / "files").saved)


def test_the_source_is_left_as_it_was(tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", shards=3)
    before = contents(folder)
    for path in folder.iterdir():
        path.chmod(0o444)
    run_steps(folder, tokens, tmp_path / "work")
    assert contents(folder) == before


def test_what_does_not_read_back_is_named(
    build: Build, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(model_type="llama", shards=3)
    # At ratio 0 whole shards are copied: a disk that flips a bit of one is found out by the comparison.
    pruned = run_steps(folder, tokens, tmp_path / "steps", PruneOptions(ratio=0.0)).pruned
    last = list(Checkpoint.open(folder).tensors)[-1]
    copy_file = model_writer.copy_file

    def flip_a_bit(source: Path, target: Path) -> None:
        copy_file(source, target)
        if target.name == "model-00003-of-00003.safetensors":
            data = bytearray(target.read_bytes())
            data[-1] ^= 1
            target.write_bytes(data)

    monkeypatch.setattr(model_writer, "copy_file", flip_a_bit)
    (tmp_path / "out").mkdir()
    with pytest.raises(CameraError, match=f"{last} does not read back as it was written"):
        save(Checkpoint.open(folder), pruned, tmp_path / "out")


@pytest.mark.parametrize("sizes", [{"layers": 2}, {"layers": 3, "hidden": 32}, {"layers": 3, "ffn": 172}])
def test_a_prune_of_a_model_of_other_sizes_is_refused(
    build: Build, tokens: torch.Tensor, tmp_path: Path, sizes: dict[str, int]
) -> None:
    pruned = run_steps(build(model_type="llama"), tokens, tmp_path / "a").pruned
    other = tiny_checkpoint(tmp_path / "other", **sizes)
    (tmp_path / "out").mkdir()
    with pytest.raises(CameraError, match=r"pruned from a model of .*\(3, 64, 192\) and .*other has"):
        save(Checkpoint.open(other), pruned, tmp_path / "out")


def test_progress_rises_to_its_end(build: Build, tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = build(model_type="llama", shards=3)
    steps = run_steps(folder, tokens, tmp_path / "steps")
    (tmp_path / "out").mkdir()
    told: list[tuple[int, int]] = []
    save(
        Checkpoint.open(folder),
        steps.pruned,
        tmp_path / "out",
        lambda done, total: told.append((done, total)),
    )
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1]
