"""A walk's state is saved as it goes, and counts once the disk has it."""

from pathlib import Path

import pytest
import torch

from camera.disk import DiskError
from camera.layerwise import resume as saving
from camera.layerwise.collectives import Collectives
from camera.layerwise.resume import StateFiles, StateSaver

MINE = "ab" * 32


def known() -> dict[str, torch.Tensor]:
    return {"layers.0.kept": torch.arange(8)}


def test_hidden_states_may_change_as_soon_as_a_state_is_written(tmp_path: Path) -> None:
    states, hidden_STH = StateFiles(tmp_path, MINE), torch.ones(2, 3, 4)
    with StateSaver(states, Collectives(), lambda: None) as saved:
        saved.save_if_due(1, known, hidden_STH)
        hidden_STH.zero_()
    found = states.newest()
    assert found is not None
    assert torch.equal(found.hidden_STH, torch.ones(2, 3, 4))


def test_a_later_state_takes_the_place_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_SHARE", 1e9)
    with StateSaver(StateFiles(tmp_path, MINE), Collectives(), lambda: None) as saved:
        for count in (1, 2, 3):
            saved.save_if_due(count, known, torch.ones(2, 3, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["resume-0003-0of1.safetensors"]


def test_a_walk_whose_time_is_short_saves_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_SHARE", 0.0)
    with StateSaver(StateFiles(tmp_path, MINE), Collectives(), lambda: None) as saved:
        for count in (1, 2, 3):
            saved.save_if_due(count, known, torch.ones(2, 3, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["resume-0001-0of1.safetensors"]


def test_a_state_whose_layers_could_not_be_made_durable_does_not_count_and_the_walk_hears_of_it(
    tmp_path: Path,
) -> None:
    def full() -> None:
        raise DiskError("the disk is full", full=True)

    saved = StateSaver(StateFiles(tmp_path, MINE), Collectives(), full)
    with pytest.raises(DiskError, match="full"), saved:
        saved.save_if_due(1, known, torch.ones(2, 3, 4))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_walk_is_told_of_its_interruption_not_of_the_disk(tmp_path: Path) -> None:
    def full() -> None:
        raise DiskError("the disk is full", full=True)

    def interrupted() -> None:
        with StateSaver(StateFiles(tmp_path, MINE), Collectives(), full) as saved:
            saved.save_if_due(1, known, torch.ones(2, 3, 4))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
