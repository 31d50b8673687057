"""Streamed pruning gives the bytes of capture, score, prune and save, and a killed one goes on where it was."""

import json
import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_header, read_tensors, write_tensors
from camera.checkpoints.weights import INDEX_NAME, SINGLE_NAME
from camera.errors import CameraError
from camera.layerwise import feed_forward as visitor
from camera.layerwise import resume as saving
from camera.layerwise.resume import StateFiles
from camera.options import CaptureOptions, PruneOptions
from camera.progress import Progress, silent
from camera.pruning import passes
from camera.pruning.folders import KEPT
from camera.pruning.model_writer import ModelWriter
from camera.pruning.prune_checkpoint import prune_checkpoint
from camera.pruning.summary import SUMMARY, Pruned
from tests.camera.pruning.conftest import (
    KINDS,
    PROPAGATIONS,
    PRUNE,
    Build,
    KilledError,
    Steps,
    contents,
    kill_at,
    only_kept,
    run_steps,
)
from tests.tiny import TOKENS, tiny_checkpoint

PANGU = {"model_type": "PanguEmbedded", "ffn": 172, "shards": 3}


@pytest.fixture(autouse=True)
def _save_after_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "RULE", saving.SaveRule(0, 1e9))


def stream(
    folder: Path,
    tokens_ST: torch.Tensor,
    out: Path,
    options: PruneOptions = PRUNE,
    progress: Progress = silent,
    **capture: Any,
) -> dict[str, bytes]:
    """Prune in one walk; every file of the output by name, and what was decided."""
    capturing = CaptureOptions(**{"device": "cpu", "batch_size": 2, **capture})
    decided: dict[str, bytes] = {}

    def look(model: Path, pruned: Path) -> None:
        assert not out.exists() or not any(out.iterdir()), "in its place before it was finished"
        assert only_kept(Pruned.open(pruned))
        decided.update({name: (pruned / name).read_bytes() for name in (KEPT, SUMMARY)})

    prune_checkpoint(Checkpoint.open(folder), tokens_ST, out, capturing, options, progress, look)
    return {**contents(out), **decided}


def stepwise(steps: Steps) -> dict[str, bytes]:
    """The same of four steps."""
    return {**contents(steps.saved), **{name: (steps.pruned / name).read_bytes() for name in (KEPT, SUMMARY)}}


def left_beside(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir()} - {out.name}


# The same bytes


@pytest.mark.parametrize("mode", ["physical", "mask"])
@pytest.mark.parametrize("propagate", PROPAGATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_walk_gives_the_bytes_of_four_steps(
    build: Build, tokens: torch.Tensor, tmp_path: Path, kind: str, propagate: str, mode: str
) -> None:
    folder = build(**KINDS[kind])
    options = PRUNE.model_copy(update={"mode": mode})
    steps = run_steps(folder, tokens, tmp_path / "steps", options, propagate=propagate)
    streamed = stream(folder, tokens, tmp_path / "one" / "out", options, propagate=propagate)
    assert streamed == stepwise(steps)
    assert left_beside(tmp_path / "one" / "out") == set()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_walk_gives_the_bytes_of_four_steps(
    build: Build, tokens: torch.Tensor, tmp_path: Path, dtype: str
) -> None:
    folder = build(**PANGU, dtype=getattr(torch, dtype))
    steps = run_steps(folder, tokens, tmp_path / "steps")
    assert stream(folder, tokens, tmp_path / "out") == stepwise(steps)


def reshard(folder: Path, out: Path, file_of: Callable[[str], int]) -> Path:
    """The same checkpoint with its tensors in other files."""
    checkpoint = Checkpoint.open(folder)
    out.mkdir()
    for name in checkpoint.side_files:
        (out / name).write_bytes((folder / name).read_bytes())
    weight_map = {name: f"model-{file_of(name):05d}.safetensors" for name in checkpoint.tensors}
    for file in set(weight_map.values()):
        held = {name: checkpoint.read(name) for name in weight_map if weight_map[name] == file}
        write_tensors(out / file, held)
    total = sum(info.size_bytes for info in checkpoint.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX_NAME).write_text(json.dumps(index))
    return out


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 2**32 - 1),
    shards=st.integers(1, 5),
    samples=st.integers(1, 7),
    length=st.integers(1, 17),
    batch=st.integers(1, 8),
    ffn=st.sampled_from([37, 64, 101]),
    tied=st.booleans(),
    propagate=st.sampled_from(PROPAGATIONS),
    mode=st.sampled_from(["physical", "mask"]),
    ratio=st.sampled_from([0.1, 0.5, 0.93]),
)
def test_whatever_the_samples_the_widths_and_the_shards_the_bytes_are_the_same(
    build: Build,
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    shards: int,
    samples: int,
    length: int,
    batch: int,
    ffn: int,
    tied: bool,
    propagate: str,
    mode: str,
    ratio: float,
) -> None:
    folder, chance = tmp_path_factory.mktemp("property"), random.Random(seed)
    plain = build(model_type="qwen2", hidden=16, ffn=ffn, tied=tied)
    model = reshard(plain, folder / "model", lambda name: chance.randrange(shards))
    tokens_ST = torch.randint(0, TOKENS, (samples, length), generator=torch.Generator().manual_seed(seed))
    options = PruneOptions(ratio=ratio, reduce_ratio=chance.random(), multiple_of=1, mode=mode)  # type: ignore[arg-type]
    how = {"propagate": propagate, "batch_size": batch}
    steps = run_steps(model, tokens_ST, folder / "steps", options, **how)
    assert stream(model, tokens_ST, folder / "out", options, **how) == stepwise(steps)


@pytest.mark.parametrize("kind", ["llama", "PanguEmbedded, 172 channels, 3 shards"])
def test_ratio_zero_gives_back_every_byte(
    build: Build, tokens: torch.Tensor, tmp_path: Path, kind: str
) -> None:
    folder = build(**KINDS[kind])
    none = PRUNE.model_copy(update={"ratio": 0.0})
    streamed = stream(folder, tokens, tmp_path / "out", none)
    assert streamed.keys() - {KEPT, SUMMARY} == contents(folder).keys()
    assert all(streamed[name] == data for name, data in contents(folder).items())


@pytest.mark.parametrize("propagate", PROPAGATIONS)
def test_hidden_states_that_exceed_memory_lie_in_a_mapped_file_and_change_nothing(
    build: Build, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, propagate: str
) -> None:
    folder = build(**PANGU)
    plain = stream(folder, tokens, tmp_path / "plain", propagate=propagate)
    mapped: list[int] = []
    from_file = torch.from_file

    def noting(*arguments: Any, **options: Any) -> torch.Tensor:
        mapped.append(options["size"])
        return from_file(*arguments, **options)

    monkeypatch.setattr(torch, "from_file", noting)
    for module in (passes, visitor):
        monkeypatch.setattr(module, "free_memory_bytes", lambda device: 1000)
    out = tmp_path / "mapped" / "out"
    with pytest.raises(KilledError):
        stream(folder, tokens, out, progress=kill_at(8), propagate=propagate)
    work = tmp_path / "mapped" / ".out.partial" / ".work"
    assert sorted(contents(work)) == ["begun.json", "resume-0001-0of1.safetensors", "written.json"]
    assert stream(folder, tokens, out, propagate=propagate) == plain
    assert mapped == [5 * 24 * 64] * 2
    assert left_beside(out) == set()


# Killed and resumed


@pytest.mark.parametrize("propagate", PROPAGATIONS)
@pytest.mark.parametrize("killed_after", [1, 3, 4, 6, 7, 9, 10])  # of ten times that progress is told
def test_a_killed_walk_goes_on_at_the_layer_it_was_in(
    build: Build,
    tokens: torch.Tensor,
    tmp_path: Path,
    read_names: list[str],
    propagate: str,
    killed_after: int,
) -> None:
    folder, out = build(**PANGU), tmp_path / "killed" / "out"
    undisturbed = stream(folder, tokens, tmp_path / "undisturbed", propagate=propagate)
    calls = 0

    def kill(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == killed_after:
            raise KilledError

    with pytest.raises(KilledError):
        stream(folder, tokens, out, progress=kill, propagate=propagate)
    assert not out.exists()
    assert left_beside(out) == {".out.partial"}

    read_names.clear()
    assert stream(folder, tokens, out, propagate=propagate) == undisturbed
    finished = min(
        (killed_after - 1) // 3, 2
    )  # three batches make a layer; behind the last there is no state
    for touched in ("self_attn.q_proj", "mlp.up_proj"):  # neither computed nor written again
        layers = [layer for layer in range(3) if f"model.layers.{layer}.{touched}.weight" in read_names]
        assert layers == list(range(finished, 3))
    assert left_beside(out) == set()


@pytest.mark.parametrize("step", ["write_rest", "finish"])
def test_a_walk_killed_after_its_last_layer_does_not_begin_again(
    build: Build,
    tokens: torch.Tensor,
    tmp_path: Path,
    read_names: list[str],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    folder = build(**PANGU)
    undisturbed = stream(folder, tokens, tmp_path / "undisturbed")

    def kill(target: ModelWriter) -> None:
        raise KilledError

    with monkeypatch.context() as killing:
        killing.setattr(ModelWriter, step, kill)
        with pytest.raises(KilledError):
            stream(folder, tokens, tmp_path / "out")
    read_names.clear()
    assert stream(folder, tokens, tmp_path / "out") == undisturbed
    assert "model.layers.1.self_attn.q_proj.weight" not in read_names


@pytest.mark.parametrize("propagate", PROPAGATIONS)
def test_a_walk_killed_again_and_again_ends_the_same(
    build: Build, tokens: torch.Tensor, tmp_path: Path, propagate: str
) -> None:
    folder, chance = build(model_type="qwen2", tied=True), random.Random(propagate)
    undisturbed = stream(folder, tokens, tmp_path / "undisturbed", propagate=propagate)
    for limit in sorted(chance.randint(1, 15) for _ in range(6)):
        with pytest.raises(KilledError):
            stream(folder, tokens, tmp_path / "out", progress=kill_at(limit), propagate=propagate)
    assert stream(folder, tokens, tmp_path / "out", propagate=propagate) == undisturbed


def run_for(seconds: float, work: Callable[..., object], *arguments: object, **options: object) -> bool:
    """Run in a process of its own and kill it without warning after a while; whether it ended before."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments, kwargs=options)
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("propagate", PROPAGATIONS)
def test_a_process_killed_at_any_moment_is_gone_on_with_and_ends_with_the_same_bytes(
    build: Build, tokens: torch.Tensor, tmp_path: Path, propagate: str, seed: int
) -> None:
    folder, out = build(**PANGU), tmp_path / "killed" / "out"
    begun = time.monotonic()
    stream(folder, tokens, tmp_path / "undisturbed", propagate=propagate)
    model = contents(tmp_path / "undisturbed")
    whole = time.monotonic() - begun
    capture = CaptureOptions(propagate=propagate, device="cpu", batch_size=2)  # type: ignore[arg-type]
    given = (Checkpoint.open(folder), tokens, out, capture, PRUNE)
    chance = random.Random(f"{propagate}{seed}")
    for _ in range(12):
        if run_for(chance.uniform(0, whole), prune_checkpoint, *given):
            break
        assert not out.exists() or contents(out) == model, "the output appeared before it was whole"
        if out.exists():
            break
    else:
        prune_checkpoint(*given)
    assert contents(out) == model
    assert left_beside(out) <= {
        ".out.lock"
    }  # killed behind the last rename, it leaves an empty lock that nobody holds


def leave_unfinished(folder: Path, tokens_ST: torch.Tensor, out: Path) -> Path:
    """What a kill in the third layer leaves."""
    with pytest.raises(KilledError):
        stream(folder, tokens_ST, out, progress=kill_at(12))
    return out.with_name(f".{out.name}.partial")


@pytest.mark.parametrize(
    "change", ["tokens", "ratio", "reduce ratio", "mode", "propagation", "dtype", "weights", "damaged"]
)
def test_an_unfinished_walk_of_other_inputs_is_not_gone_on_with(
    tokens: torch.Tensor, tmp_path: Path, change: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=3)
    partial = leave_unfinished(folder, tokens, tmp_path / "out")
    prunes = {"ratio": {"ratio": 0.5}, "reduce ratio": {"reduce_ratio": 0.1}, "mode": {"mode": "mask"}}
    options = PRUNE.model_copy(update=prunes.get(change, {}))
    how = {"propagation": {"propagate": "one-shot"}, "dtype": {"dtype": "bfloat16"}}.get(change, {})
    if change == "tokens":
        tokens = tokens.flip(1)
    elif change == "weights":
        name = "model.layers.0.mlp.up_proj.weight"
        tensors = {key: value.clone() for key, value in read_tensors(folder / SINGLE_NAME).items()}
        write_tensors(folder / SINGLE_NAME, {**tensors, name: tensors[name] * 2})
    elif change == "damaged":
        (partial / ".work" / "begun.json").write_text("{")
    wanted = stream(folder, tokens, tmp_path / "undisturbed", options, **how)
    assert stream(folder, tokens, tmp_path / "out", options, **how) == wanted


@pytest.mark.parametrize("what", ["a layer", "the state", "the record"])
def test_a_flipped_bit_in_an_unfinished_model_does_not_reach_the_output(
    tokens: torch.Tensor, tmp_path: Path, what: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=3)
    wanted = stream(folder, tokens, tmp_path / "undisturbed")
    partial = leave_unfinished(folder, tokens, tmp_path / "out")
    if what == "a layer":
        info = read_header(partial / SINGLE_NAME)["model.layers.0.mlp.up_proj.weight"]
        path, at = partial / SINGLE_NAME, info.offset + info.size_bytes - 1
    else:
        name = "resume-*.safetensors" if what == "the state" else "written.json"
        (path,) = (partial / ".work").glob(name)
        at = path.stat().st_size - 5
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert stream(folder, tokens, tmp_path / "out") == wanted


def test_an_unfinished_walk_that_lost_a_shard_says_what_to_remove(
    build: Build, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(**PANGU)
    partial = leave_unfinished(folder, tokens, tmp_path / "out")
    (partial / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CameraError, match=r"model-00002-of-00003\.safetensors is missing: remove its folder"):
        stream(folder, tokens, tmp_path / "out")


def test_what_a_kill_left_half_written_does_not_reach_the_output(
    build: Build, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(**PANGU)
    undisturbed = stream(folder, tokens, tmp_path / "undisturbed")
    partial = leave_unfinished(folder, tokens, tmp_path / "out")
    ended = multiprocessing.get_context("fork").Process(target=int)
    ended.start()
    ended.join()
    (partial / f".config.json.{ended.pid}.tmp").write_text("{")
    (partial / ".work" / f".prune.json.{ended.pid}.tmp").write_text("{")
    (partial / ".model-00001-of-00003.safetensors.h0123456789ab.1.tmp").write_text(
        ""
    )  # killed on another host
    prune_checkpoint(
        Checkpoint.open(folder), tokens, tmp_path / "out", CaptureOptions(device="cpu", batch_size=2), PRUNE
    )
    assert contents(tmp_path / "out").keys() == undisturbed.keys() - {KEPT, SUMMARY}


def test_a_layer_is_durable_before_a_state_says_that_it_is_done(
    build: Build, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for owner, name in ((ModelWriter, "write"), (ModelWriter, "sync"), (StateFiles, "drop_before")):
        original = getattr(owner, name)

        def noting(self: object, *given: object, name: str = name, original: Any = original) -> None:
            original(self, *given)
            done.append(name)

        monkeypatch.setattr(owner, name, noting)
    stream(build(**PANGU), tokens, tmp_path / "out")
    counted = [at for at, name in enumerate(done) if name == "drop_before"]  # called once a state counts
    assert len(counted) == 2
    for layers, at in enumerate(counted, 1):
        synced = max(position for position in range(at) if done[position] == "sync")
        assert done[:synced].count("write") >= layers


def test_a_kill_while_the_shards_are_laid_out_leaves_nothing_that_is_gone_on_with(
    build: Build, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(**PANGU)
    laid_out: list[Path] = []

    def kill_at_the_second(descriptor: int, size: int) -> None:
        laid_out.append(tmp_path)
        if len(laid_out) == 2:
            raise KilledError

    with monkeypatch.context() as killing:
        killing.setattr("camera.checkpoints.safetensors_file.reserve", kill_at_the_second)
        with pytest.raises(KilledError):
            stream(folder, tokens, tmp_path / "out")
    assert (tmp_path / ".out.partial" / "model-00001-of-00003.safetensors").is_file()
    assert stream(folder, tokens, tmp_path / "out") == stream(folder, tokens, tmp_path / "undisturbed")


# What it refuses


@pytest.mark.parametrize("occupied", ["file", "folder"])
def test_an_occupied_output_is_refused_and_left_alone(
    build: Build, tokens: torch.Tensor, tmp_path: Path, occupied: str
) -> None:
    out = tmp_path / "out"
    mine = out if occupied == "file" else out / "mine"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(CameraError, match=f"{out} already exists and is not empty"):
        stream(build(model_type="llama"), tokens, out)
    assert mine.read_text() == "mine"
    assert left_beside(out) == set()


def test_an_empty_output_folder_is_filled(build: Build, tokens: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    stream(build(model_type="llama"), tokens, tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").ffn_width == 136


def test_a_ratio_that_prunes_nothing_is_refused_before_anything_is_written(
    build: Build, tokens: torch.Tensor, tmp_path: Path
) -> None:
    options = PruneOptions(ratio=0.2, multiple_of=64)
    with pytest.raises(CameraError, match="nothing would be pruned"):
        stream(build(model_type="qwen2", ffn=172), tokens, tmp_path / "out", options)
    assert left_beside(tmp_path / "out") == set()


def test_progress_rises_from_batch_to_batch_to_its_end(
    build: Build, tokens: torch.Tensor, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    stream(
        build(model_type="llama"), tokens, tmp_path / "out", progress=lambda *numbers: told.append(numbers)
    )
    assert [done for done, _ in told] == [2, 4, 5, 7, 9, 10, 12, 14, 15, 15]
    assert {total for _, total in told} == {15}


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_nan_in_what_no_layer_reads_is_refused_before_the_work(
    tokens: torch.Tensor, tmp_path: Path, name: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    tensors = {key: value.clone() for key, value in read_tensors(folder / SINGLE_NAME).items()}
    tensors[name].view(-1)[-1] = torch.nan
    write_tensors(folder / SINGLE_NAME, tensors)
    with pytest.raises(CameraError, match=f"{name} holds NaN or infinity"):
        stream(folder, tokens, tmp_path / "out", PRUNE)
