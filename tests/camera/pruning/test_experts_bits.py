"""What is promised of the bytes of pruned experts.

Activations are the same bits however samples are batched, chunked or split over ranks, because rows too few for the usual
matrix product are filled up; a sample's statistics are float32 sums, samples are added in float64. So channels and bytes
do not depend on the batch size, nor on memory. (Of a function like the sigmoid torch computes the last numbers of a tensor
that do not fill a whole vector in another way: windows of a multiple of 32 tokens have no such rest.) Ranks add their float64 sums in another order, which may change the last bit
of an importance, and no choice short of a tie; the float32 Gram sums of a refit differ by as much as float32 sums do.
"""

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
from safetensors.torch import load

from camera.checkpoints.checkpoint import Checkpoint
from camera.layerwise import experts_pass, feed_forward
from camera.layerwise import resume as saving
from camera.options import CaptureOptions, PruneOptions
from camera.progress import Progress, silent
from camera.pruning.folders import KEPT, SCORES, STATISTICS
from camera.pruning.prune_checkpoint import prune_checkpoint
from camera.pruning.summary import SUMMARY
from tests.camera.pruning.conftest import PROPAGATIONS, KilledError, contents, kill_at, run_steps
from tests.tiny import TOKENS, tiny_moe_checkpoint

PRUNE = PruneOptions(ratio=0.3, reduce_ratio=0.6, multiple_of=8)
DROP = PRUNE.model_copy(update={"experts": 0.25})
REFIT = PRUNE.model_copy(update={"method": "refit"})
DROP_AND_REFIT = DROP.model_copy(update={"method": "refit"})
SPLIT = PruneOptions(ratio=0.45, reduce_ratio=0.6, multiple_of=8, experts="auto")
SPARSE = DROP.model_copy(update={"sparsity": 0.4})
WAYS = {
    "channels": PRUNE,
    "experts": DROP,
    "split": SPLIT,
    "sparse": SPARSE,
    "refit": REFIT,
    "experts and refit": DROP_AND_REFIT,
}
FOUND = (KEPT, SUMMARY, SCORES, STATISTICS)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"shards": 3},
    "deepseek_v3": {"dtype": torch.bfloat16},
    "mixtral": {"dtype": torch.bfloat16},
}


@pytest.fixture(autouse=True)
def _save_after_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "RULE", saving.SaveRule(0, 1e9))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny checkpoint of each of three families."""
    return {
        name: tiny_moe_checkpoint(tmp_path_factory.mktemp(name), name, **options)
        for name, options in FAMILIES.items()
    }


@pytest.fixture
def tokens() -> torch.Tensor:
    """Five calibration windows: no multiple of a batch of two."""
    return torch.randint(0, TOKENS, (5, 32), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def many_tokens() -> torch.Tensor:
    """So many that some experts are refitted and some are not."""
    return torch.randint(0, TOKENS, (16, 96), generator=torch.Generator().manual_seed(7))


def stream(
    folder: Path,
    tokens_ST: torch.Tensor,
    out: Path,
    options: PruneOptions = PRUNE,
    progress: Progress = silent,
    **capture: Any,
) -> dict[str, bytes]:
    """Prune in one walk; every file of the output by name, and what was found out."""
    capturing = CaptureOptions(**{"device": "cpu", "batch_size": 2, **capture})
    found: dict[str, bytes] = {}

    def look(model: Path, pruned: Path) -> None:
        found.update({name: (pruned / name).read_bytes() for name in FOUND})

    prune_checkpoint(Checkpoint.open(folder), tokens_ST, out, capturing, options, progress, look)
    return {**contents(out), **found}


@pytest.mark.parametrize("propagate", PROPAGATIONS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_one_walk_gives_the_bytes_of_four_stages(
    folders: dict[str, Path],
    tokens: torch.Tensor,
    many_tokens: torch.Tensor,
    tmp_path: Path,
    model_type: str,
    way: str,
    propagate: str,
) -> None:
    used = many_tokens if "refit" in way else tokens
    steps = run_steps(folders[model_type], used, tmp_path / "steps", WAYS[way], propagate=propagate)
    files = {KEPT: steps.pruned, SUMMARY: steps.pruned, SCORES: steps.scored, STATISTICS: steps.captured}
    wanted = {**contents(steps.saved), **{name: (place / name).read_bytes() for name, place in files.items()}}
    got = stream(folders[model_type], used, tmp_path / "out", WAYS[way], propagate=propagate)
    if "refit" in way:
        assert {each["refitted"] for each in json.loads(got[SUMMARY])["decisions"]} == {True, False}
    assert got.keys() == wanted.keys()
    assert [name for name in got if got[name] != wanted[name]] == []


@pytest.mark.parametrize("way", ["experts", "refit", "sparse"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_neither_the_batch_nor_memory_changes_a_byte(
    folders: dict[str, Path],
    tokens: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    way: str,
) -> None:
    folder = folders[model_type]
    wanted = stream(folder, tokens, tmp_path / "2", WAYS[way])

    def check(name: str, **capture: Any) -> None:
        got = stream(folder, tokens, tmp_path / name, WAYS[way], **capture)
        assert [file for file in got if got[file] != wanted[file]] == [], name

    for size in (1, 3, 5):
        check(f"batch {size}", batch_size=size)
    with monkeypatch.context() as patched:
        patched.setattr(feed_forward, "ACTIVATION_BUDGET_BYTES", 0)
        check("computed again")
    with monkeypatch.context() as patched:
        patched.setattr(experts_pass, "CHUNK_BYTES", 1)
        check("a sample at once")


# Killed and resumed


@pytest.mark.parametrize("way", ["experts", "experts and refit"])
@pytest.mark.parametrize("killed_at", [6, 12, 15])
def test_a_walk_killed_within_a_sparse_layer_goes_on_there_and_ends_with_the_same_bytes(
    folders: dict[str, Path],
    many_tokens: torch.Tensor,
    tmp_path: Path,
    read_names: list[str],
    way: str,
    killed_at: int,
) -> None:
    folder, used = folders["qwen2_moe"], many_tokens[:5] if way == "experts" else many_tokens
    undisturbed = stream(folder, used, tmp_path / "undisturbed", WAYS[way])
    samples = len(used)
    with pytest.raises(KilledError):
        stream(folder, used, tmp_path / "out", WAYS[way], kill_at(killed_at * samples // 5))
    read_names.clear()
    assert stream(folder, used, tmp_path / "out", WAYS[way]) == undisturbed
    done = (killed_at - 1) // 5
    computed = {
        layer for layer in range(3) if f"model.layers.{layer}.mlp.experts.0.gate_proj.weight" in read_names
    }
    assert computed == set(range(done, 3))


def run_for(seconds: float, work: Callable[..., object], *arguments: object) -> bool:
    """Run in a process of its own and kill it without warning after a while; whether it ended before."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


@pytest.mark.parametrize("way", ["channels", "split", "experts and refit"])
def test_a_process_killed_at_any_moment_is_gone_on_with_and_ends_with_the_same_bytes(
    folders: dict[str, Path], many_tokens: torch.Tensor, tmp_path: Path, way: str
) -> None:
    folder, out, chance = folders["qwen2_moe"], tmp_path / "killed" / "out", random.Random(way)
    capture = CaptureOptions(device="cpu", batch_size=2)
    begun = time.monotonic()
    prune_checkpoint(Checkpoint.open(folder), many_tokens, tmp_path / "undisturbed", capture, WAYS[way])
    whole = time.monotonic() - begun
    given = (Checkpoint.open(folder), many_tokens, out, capture, WAYS[way])
    for _ in range(8):
        if run_for(chance.uniform(0, whole), prune_checkpoint, *given) or out.exists():
            break
    else:
        prune_checkpoint(*given)
    assert contents(out) == contents(tmp_path / "undisturbed")


# Several ranks


@pytest.mark.parametrize(
    ("model_type", "way", "devices"),
    [
        ("deepseek_v3", "experts", 2),
        pytest.param("qwen2_moe", "channels", 3, marks=pytest.mark.slow),
        pytest.param("qwen2_moe", "experts", 3, marks=pytest.mark.slow),
        pytest.param("mixtral", "channels", 2, marks=pytest.mark.slow),
    ],
)
def test_ranks_choose_as_one_process_does(
    folders: dict[str, Path], tokens: torch.Tensor, tmp_path: Path, model_type: str, way: str, devices: int
) -> None:
    folder, found = folders[model_type], []
    for count in (1, devices):
        out = tmp_path / str(count)
        got = stream(folder, tokens, out, WAYS[way], devices=count)
        found.append({name: got.pop(name) for name in FOUND} | {"model": got})
    assert found[0]["model"] == found[1]["model"]
    assert found[0][KEPT] == found[1][KEPT]
    for name in (SCORES, STATISTICS):
        one, several = ({**load(each[name])} for each in found)
        assert one.keys() == several.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(several[key], tensor, rtol=1e-14, atol=0, msg=key)


@pytest.mark.slow
def test_ranks_refit_as_one_process_does_but_for_rounding(
    folders: dict[str, Path], many_tokens: torch.Tensor, tmp_path: Path
) -> None:
    one, three = tmp_path / "1", tmp_path / "3"
    for out, devices in ((one, 1), (three, 3)):
        stream(folders["qwen2_moe"], many_tokens, out, REFIT, devices=devices, propagate="one-shot")
    first, second = Checkpoint.open(one), Checkpoint.open(three)
    for name in first.tensors:
        torch.testing.assert_close(second.read(name), first.read(name), rtol=1e-3, atol=1e-4)
