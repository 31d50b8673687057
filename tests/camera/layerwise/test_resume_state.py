"""A walk's state is read back as it was saved, or not at all."""

from pathlib import Path

import pytest
import torch

from camera.layerwise.resume import StateFiles, clear_states

MINE, OTHER = "ab" * 32, "cd" * 32


def known(layers: int) -> dict[str, torch.Tensor]:
    return {f"layers.{index}.sum_squares": torch.rand(8).double() for index in range(layers)}


def hidden(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 5, 4).to(dtype)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_state_reads_back_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    states, seen, hidden_STH = StateFiles(tmp_path, MINE), known(3), hidden(dtype)
    states.save(3, seen, hidden_STH)
    found = states.newest()
    assert found is not None
    assert found.hidden_STH.dtype == dtype
    assert torch.equal(found.hidden_STH, hidden_STH)
    assert found.count == 3
    assert seen.keys() == found.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in seen.items())


def test_what_is_read_outlives_its_file(tmp_path: Path) -> None:
    states, hidden_STH = StateFiles(tmp_path, MINE), hidden()
    states.save(2, known(2), hidden_STH)
    found = states.newest()
    clear_states(tmp_path)
    assert found is not None
    assert torch.equal(found.hidden_STH, hidden_STH)
    assert names(tmp_path) == []


def test_without_a_state_there_is_none(tmp_path: Path) -> None:
    assert StateFiles(tmp_path, MINE).newest() is None


def test_the_state_of_most_layers_is_the_newest(tmp_path: Path) -> None:
    states = StateFiles(tmp_path, MINE)
    for count in (9, 10, 2):  # by number, not by name
        states.save(count, known(count), hidden())
    found = states.newest()
    assert found is not None
    assert found.count == 10


def test_behind_a_damaged_state_the_one_before_is_found(tmp_path: Path) -> None:
    states = StateFiles(tmp_path, MINE)
    states.save(1, known(1), hidden())
    states.save(2, known(2), hidden())
    path = tmp_path / "resume-0002-0of1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    found = states.newest()
    assert found is not None
    assert found.count == 1


def test_a_state_of_other_inputs_is_no_state_and_stays(tmp_path: Path) -> None:
    StateFiles(tmp_path, OTHER).save(2, known(2), hidden())
    assert StateFiles(tmp_path, MINE).newest() is None
    assert names(tmp_path) == ["resume-0002-0of1.safetensors"]


def test_a_state_counts_once_every_rank_has_saved_it(tmp_path: Path) -> None:
    first, second = (StateFiles(tmp_path, MINE, rank, 2) for rank in range(2))
    for states in (first, second):
        states.save(1, known(1), hidden())
    first.save(2, known(2), hidden())
    for states in (first, second):
        found = states.newest()
        assert found is not None
        assert found.count == 1
    second.save(2, known(2), hidden())
    found = first.newest()
    assert found is not None
    assert found.count == 2


def test_a_state_of_another_number_of_ranks_is_no_state(tmp_path: Path) -> None:
    StateFiles(tmp_path, MINE, 0, 1).save(2, known(2), hidden())
    assert StateFiles(tmp_path, MINE, 0, 2).newest() is None


def test_each_rank_drops_its_own_older_states(tmp_path: Path) -> None:
    first, second = (StateFiles(tmp_path, MINE, rank, 2) for rank in range(2))
    for states in (first, second):
        for count in (1, 2, 3):
            states.save(count, known(count), hidden())
    first.drop_before(3)
    assert names(tmp_path) == [
        "resume-0001-1of2.safetensors",
        "resume-0002-1of2.safetensors",
        "resume-0003-0of2.safetensors",
        "resume-0003-1of2.safetensors",
    ]


def test_clearing_removes_every_state_and_nothing_else(tmp_path: Path) -> None:
    StateFiles(tmp_path, MINE).save(1, known(1), hidden())
    StateFiles(tmp_path, OTHER, 1, 3).save(2, known(2), hidden())
    (tmp_path / "statistics.safetensors").write_bytes(b"")
    clear_states(tmp_path)
    assert names(tmp_path) == ["statistics.safetensors"]


def test_a_file_that_is_called_like_a_state_and_is_none_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "resume-many-0of1.safetensors").write_bytes(b"?")
    (tmp_path / "resume-0007-0of1.safetensors").mkdir()
    states = StateFiles(tmp_path, MINE)
    assert states.newest() is None
    states.save(1, known(1), hidden())
    assert states.newest() is not None
