"""Several processes walk one model together: the same result, and an end within seconds whatever befalls one."""

import faulthandler
import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.layerwise import collectives as ranks_module
from camera.layerwise import resume as saving
from camera.layerwise.collectives import Collectives, ranks
from camera.layerwise.statistics import BlockStatistics, read_statistics
from camera.options import CaptureOptions
from camera.progress import Progress, silent
from camera.pruning.folders import STATISTICS
from camera.pruning.importance import importance, kept_channels
from camera.pruning.plan import kept_width, plan_prune
from camera.pruning.prune_checkpoint import prune_checkpoint
from camera.pruning.stages import capture
from tests.camera.pruning.conftest import PRUNE, Build, KilledError, contents, kill_at, only
from tests.tiny import TOKENS

SECONDS = 120
"""What would else be hours of waiting; on a busy machine a test takes twenty."""


@pytest.fixture(autouse=True)
def _never_hang() -> Iterator[None]:
    """End this process with a traceback if a test hangs: what waits inside torch hears no signal."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def seven() -> torch.Tensor:
    """Seven calibration windows: no multiple of two or three ranks."""
    return torch.randint(0, TOKENS, (7, 24), generator=torch.Generator().manual_seed(3))


def run_capture(
    folder: Path,
    tokens_ST: torch.Tensor,
    out: Path,
    devices: int,
    propagate: str,
    progress: Progress = silent,
) -> list[BlockStatistics]:
    out.mkdir(exist_ok=True)
    checkpoint = Checkpoint.open(folder)
    options = CaptureOptions(propagate=propagate, device="cpu", batch_size=1, devices=devices)  # type: ignore[arg-type]
    capture(checkpoint, tokens_ST, out, options, plan_prune(checkpoint, options, PRUNE), progress)
    return only(read_statistics(out / STATISTICS, checkpoint.layer_count))


def kept_by(folder: Path, layers: list[BlockStatistics]) -> list[list[int]]:
    checkpoint = Checkpoint.open(folder)
    count = kept_width(checkpoint.ffn_width, PRUNE.ratio, PRUNE.multiple_of)
    kept = []
    for index, layer in enumerate(layers):
        down_HF = checkpoint.read(checkpoint.ffn_names(index)[2])
        kept.append(kept_channels(importance(layer, down_HF, PRUNE.reduce_ratio), count).tolist())
    return kept


# The same result


@pytest.mark.parametrize(
    ("count", "propagate"),
    [
        (2, "sequential"),
        (3, "one-shot"),
        pytest.param(2, "one-shot", marks=pytest.mark.slow),
        pytest.param(3, "sequential", marks=pytest.mark.slow),
    ],
)
def test_however_many_ranks_share_the_samples_the_same_channels_stay(
    build: Build, seven: torch.Tensor, tmp_path: Path, count: int, propagate: str
) -> None:
    folder = build(model_type="PanguEmbedded", ffn=172, shards=3)
    alone = run_capture(folder, seven, tmp_path / "alone", 1, propagate)
    shared = run_capture(folder, seven, tmp_path / "shared", count, propagate)
    for one, several in zip(alone, shared, strict=True):
        torch.testing.assert_close(several.sum_squares_F, one.sum_squares_F, rtol=1e-12, atol=0)
        assert torch.equal(several.max_abs_F, one.max_abs_F)
    assert kept_by(folder, shared) == kept_by(folder, alone)
    told = json.loads((tmp_path / "shared" / "capture.json").read_text())
    assert (told["samples"], told["tokens"]) == (7, 7 * 24)
    assert set(contents(tmp_path / "shared")) == set(contents(tmp_path / "alone"))


def test_two_ranks_that_prune_in_one_walk_write_the_bytes_of_one(
    build: Build, seven: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(model_type="qwen3", ffn=172, shards=3)
    for devices in (1, 2):
        capturing = CaptureOptions(device="cpu", batch_size=1, devices=devices)
        out = tmp_path / str(devices)
        prune_checkpoint(Checkpoint.open(folder), seven, out, capturing, PRUNE)
    assert contents(tmp_path / "2") == contents(tmp_path / "1")


def test_a_killed_walk_of_two_ranks_goes_on_at_the_layer_it_was_in(
    build: Build, seven: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(model_type="llama")
    undisturbed = run_capture(folder, seven, tmp_path / "undisturbed", 1, "sequential")
    monkeypatch.setattr(saving, "RULE", saving.SaveRule(0, 1e9))  # the first rank decides when to save
    with pytest.raises(KilledError):
        run_capture(folder, seven, tmp_path / "killed", 2, "sequential", kill_at(2 * 4 + 1))
    saved = {f"resume-0002-{rank}of2.safetensors" for rank in range(2)}
    assert set(contents(tmp_path / "killed")) == {*saved, "parts.json"}
    told: list[int] = []
    resumed = run_capture(
        folder, seven, tmp_path / "killed", 2, "sequential", lambda done, total: told.append(done)
    )
    assert min(told) > 2 * 4  # the first rank has four samples
    assert kept_by(folder, resumed) == kept_by(folder, undisturbed)
    assert set(contents(tmp_path / "killed")) == set(contents(tmp_path / "undisturbed"))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["of one rank is missing", "of one rank is damaged"])
def test_a_state_that_not_every_rank_can_read_is_no_state(
    build: Build, seven: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    folder = build(model_type="llama")
    monkeypatch.setattr(saving, "RULE", saving.SaveRule(0, 1e9))
    with pytest.raises(KilledError):
        run_capture(folder, seven, tmp_path / "out", 2, "one-shot", kill_at(2 * 4 + 1))
    theirs = tmp_path / "out" / "resume-0002-1of2.safetensors"
    if damage.endswith("missing"):
        theirs.unlink()
    else:
        theirs.write_bytes(b"damaged")
    told: list[int] = []
    resumed = run_capture(
        folder, seven, tmp_path / "out", 2, "one-shot", lambda done, total: told.append(done)
    )
    assert min(told) == 1
    assert kept_by(folder, resumed) == kept_by(
        folder, run_capture(folder, seven, tmp_path / "alone", 1, "one-shot")
    )


@pytest.mark.parametrize(("samples", "count"), [(7, 2), (7, 3), (2, 2), (8, 3), (5, 1)])
def test_shares_are_consecutive_even_and_complete(samples: int, count: int) -> None:
    tokens_ST = torch.arange(samples)[:, None]
    shares = [Collectives(rank, count).share(tokens_ST) for rank in range(count)]
    assert torch.equal(torch.cat(shares), tokens_ST)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


# What befalls a rank. The functions run in the other processes.


def meet(us: Collectives, report: Path) -> None:
    """One sum and one maximum over all ranks, a value of the first, and a vote."""
    mine = BlockStatistics(torch.tensor([float(us.rank)]).double(), torch.tensor([float(us.rank)]))
    us.merge(mine)
    found = {
        "sum": float(mine.sum_squares_F),
        "max": float(mine.max_abs_F),
        "agreed": us.broadcast_int(us.rank + 5),
        "equal": us.all_equal(7),
        "unequal": us.all_equal(us.rank),
        "threads": torch.get_num_threads(),
    }
    us.barrier()
    (report / f"{us.rank}.json").write_text(json.dumps(found))


def refuse(us: Collectives) -> None:
    raise CameraError(f"rank {us.rank} read a damaged checkpoint: fetch it again")


def refuse_late(us: Collectives) -> None:
    us.barrier()
    refuse(us)


def stumble(us: Collectives) -> None:
    raise ZeroDivisionError


def die(us: Collectives) -> None:
    us.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


class DiesAtStart:
    """Ends the process that unpickles it, before any work."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


def do_nothing(us: Collectives, *arguments: object) -> None:
    pass


def walk_on(us: Collectives, layers: int = 5) -> None:
    """Meet, and merge layer by layer."""
    us.barrier()
    for _ in range(layers):
        us.merge(BlockStatistics.zeros(4))


def run_beside(work: Callable[..., None]) -> None:
    """Walk on as the first of two ranks while the other does its work."""
    with ranks(2, work) as us:
        walk_on(us)


def test_ranks_meet_and_threads_are_shared(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with ranks(2, meet, tmp_path) as us:
            meet(us, tmp_path)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "sum": 1, "max": 1, "agreed": 5, "equal": True, "unequal": False, "threads": 2,
        }  # fmt: skip


def test_alone_there_is_no_other_process() -> None:
    with ranks(1, refuse) as us:
        assert (us.rank, us.count, us.first) == (0, 1, True)
        walk_on(us)
        assert us.broadcast_int(3) == 3
        assert us.all_equal(3)
        assert multiprocessing.active_children() == []


def test_torchs_global_group_is_left_to_others(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with ranks(2, walk_on) as us:
            walk_on(us)
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("work", [refuse, refuse_late])
def test_what_a_rank_refuses_ends_all_with_its_words(work: Any) -> None:
    with pytest.raises(CameraError, match="rank 1 read a damaged checkpoint"):
        run_beside(work)
    assert multiprocessing.active_children() == []


def test_a_rank_that_refuses_while_the_first_has_nothing_left_to_do_is_heard() -> None:
    with pytest.raises(CameraError, match="rank 1 read a damaged checkpoint"), ranks(2, refuse):
        pass


@pytest.mark.parametrize("work", [stumble, die])
def test_a_rank_that_is_lost_ends_the_others(work: Any) -> None:
    with pytest.raises(CameraError, match="a rank was lost"):
        run_beside(work)
    assert multiprocessing.active_children() == []


def test_a_rank_that_is_lost_after_the_last_merge_is_missed() -> None:
    with pytest.raises(CameraError, match="a rank was lost: one of them ended too early"), ranks(2, stumble):
        pass


def test_a_rank_killed_before_the_ranks_have_met_is_not_waited_for_long_and_the_next_ones_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(ranks_module, "_START_TIMEOUT", timedelta(seconds=2))
    await_all = ranks_module._wait_for_start

    def await_and_kill(others: list[Any], meeting: Path) -> None:
        await_all(others, meeting)
        others[0].kill()  # ready, and not there: most often it has not begun to join
        (meeting / "store").unlink(missing_ok=True)

    with monkeypatch.context() as killing:
        killing.setattr(ranks_module, "_wait_for_start", await_and_kill)
        with pytest.raises(CameraError, match="a rank was lost"):
            run_beside(walk_on)
    run_beside(walk_on)
    assert multiprocessing.active_children() == []
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_dies_at_its_start_is_not_waited_for() -> None:
    with (
        pytest.raises(CameraError, match=r"a rank ended at its start \(exit code 3\)"),
        ranks(2, do_nothing, DiesAtStart()),
    ):
        pytest.fail("the work began")


def test_an_error_of_the_first_rank_ends_the_others() -> None:
    def stop(us: Collectives) -> None:
        us.barrier()
        us.merge(BlockStatistics.zeros(4))
        raise KilledError

    with pytest.raises(KilledError), ranks(2, walk_on) as us:
        stop(us)
    assert multiprocessing.active_children() == []


def test_more_ranks_than_samples_are_refused(build: Build, seven: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(CameraError, match="2 samples cannot be split over 3 devices"):
        run_capture(build(model_type="llama"), seven[:2], tmp_path / "out", 3, "one-shot")


def test_a_damaged_weight_is_named_by_whichever_rank_reads_it(
    build: Build, seven: torch.Tensor, tmp_path: Path
) -> None:
    other = seven.clone()
    other[-1, 0] = TOKENS + 5  # a token that only the last rank sees
    with pytest.raises(CameraError, match="outside the embedding's"):
        run_capture(build(model_type="llama"), other, tmp_path / "out", 2, "one-shot")
