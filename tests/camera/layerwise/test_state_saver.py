"""A walk's state is saved as it goes, and counts once the disk has it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from camera.disk import DiskError
from camera.layerwise import resume as saving
from camera.layerwise.collectives import Collectives
from camera.layerwise.resume import StateFiles, StateSaver

MINE = "ab" * 32


def known() -> dict[str, torch.Tensor]:
    return {"layers.0.kept": torch.arange(8)}


@pytest.fixture
def every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "RULE", saving.SaveRule(0, 1e9))


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def saved_after(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    layer_seconds: list[float],
    saving_seconds: float = 0.0,
    samples: int = 2,
) -> list[int]:
    """After which layers a state is saved."""
    clock, counts = Clock(), []
    monkeypatch.setattr(saving, "time", clock)
    write = StateFiles.write

    def slowly(self: StateFiles, count: int, *arguments: Any) -> Any:
        counts.append(count)
        clock.now += saving_seconds
        return write(self, count, *arguments)

    monkeypatch.setattr(StateFiles, "write", slowly)
    with StateSaver(StateFiles(folder, MINE), Collectives(), lambda: None) as saved:
        for count, seconds in enumerate(layer_seconds, 1):
            clock.now += seconds
            saved.save_if_due(count, known, torch.ones(samples, 3, 4))
    return counts


def test_a_run_that_a_kill_costs_less_than_a_minute_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert saved_after(tmp_path, monkeypatch, [1.0] * 59) == []


def test_a_state_is_saved_before_the_layer_in_which_a_kill_would_lose_more_than_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert saved_after(tmp_path, monkeypatch, [25.0] * 6) == [2, 4, 6]
    assert saved_after(tmp_path, monkeypatch, [100.0] * 3) == [1, 2, 3]


def test_states_take_no_more_than_their_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 10 s every 500 s; before the first has been written, what it will cost is told from its size.
    assert saved_after(tmp_path, monkeypatch, [100.0] * 16, saving_seconds=10.0) == [1, 6, 11, 16]
    monkeypatch.setattr(saving, "_BYTES_PER_SECOND", 96 / 7)
    assert saved_after(tmp_path, monkeypatch, [100.0] * 5) == [4, 5]


@pytest.mark.usefixtures("every_layer")
def test_hidden_states_may_change_as_soon_as_a_state_is_written(tmp_path: Path) -> None:
    states, hidden_STH = StateFiles(tmp_path, MINE), torch.ones(2, 3, 4)
    with StateSaver(states, Collectives(), lambda: None) as saved:
        saved.save_if_due(1, known, hidden_STH)
        hidden_STH.zero_()
    found = states.newest()
    assert found is not None
    assert torch.equal(found.hidden_STH, torch.ones(2, 3, 4))


@pytest.mark.usefixtures("every_layer")
def test_a_later_state_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    with StateSaver(StateFiles(tmp_path, MINE), Collectives(), lambda: None) as saved:
        for count in (1, 2, 3):
            saved.save_if_due(count, known, torch.ones(2, 3, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["resume-0003-0of1.safetensors"]


@pytest.mark.usefixtures("every_layer")
def test_a_state_whose_layers_could_not_be_made_durable_does_not_count_and_the_walk_hears_of_it(
    tmp_path: Path,
) -> None:
    def full() -> None:
        raise DiskError("the disk is full", full=True)

    saved = StateSaver(StateFiles(tmp_path, MINE), Collectives(), full)
    with pytest.raises(DiskError, match="full"), saved:
        saved.save_if_due(1, known, torch.ones(2, 3, 4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("every_layer")
def test_an_interrupted_walk_is_told_of_its_interruption_not_of_the_disk(tmp_path: Path) -> None:
    def full() -> None:
        raise DiskError("the disk is full", full=True)

    def interrupted() -> None:
        with StateSaver(StateFiles(tmp_path, MINE), Collectives(), full) as saved:
            saved.save_if_due(1, known, torch.ones(2, 3, 4))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
