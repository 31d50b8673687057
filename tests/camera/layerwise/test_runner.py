"""A layer that reads its own tensors computes what it computes in transformers' whole model."""

from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.files import read_json, write_json
from camera.layerwise import runner as layer_runner
from camera.layerwise.runner import LayerRunner
from tests.tiny import MOE_TYPES, tiny_checkpoint, tiny_moe_checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_layer_by_layer_hidden_states_are_the_whole_model_s(tmp_path: Path, model_type: str) -> None:
    compare_with_the_whole_model(Checkpoint.open(tiny_moe_checkpoint(tmp_path / "model", model_type)))


def compare_with_the_whole_model(checkpoint: Checkpoint) -> None:
    ids_ST = torch.randint(3, 350, (2, 40), generator=torch.Generator().manual_seed(0))
    runner = LayerRunner(checkpoint, CPU, torch.float32)
    hidden, run = runner.embed(ids_ST), runner.caller(40)
    model = checkpoint.load_model()
    with torch.no_grad():
        for layer in range(checkpoint.layer_count):
            with runner.layer(layer) as module:
                hidden = run(module, hidden)
        expected = model.model(ids_ST).last_hidden_state
        torch.testing.assert_close(model.model.norm(hidden), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_what_transformers_holds_in_float32_is_held_so_in_half_precision_too(
    tmp_path: Path, model_type: str
) -> None:
    checkpoint = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "model", model_type))
    runner = LayerRunner(checkpoint, CPU, torch.bfloat16)
    whole = checkpoint.load_model(torch.bfloat16).model.layers[1].state_dict()
    with runner.layer(1) as module:
        held = {name: value.dtype for name, value in module.state_dict().items() if not value.is_meta}
    assert held == {name: value.dtype for name, value in whole.items() if name in held}
    assert len(held) >= len(whole) - 2, "all but the experts"


@pytest.mark.parametrize("model_type", ["mixtral", "phimoe"])
def test_a_window_shorter_than_the_context_hides_what_transformers_hides(
    tmp_path: Path, model_type: str
) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", model_type)
    write_json(folder / "config.json", read_json(folder / "config.json") | {"sliding_window": 8})
    compare_with_the_whole_model(Checkpoint.open(folder))


def embedded(checkpoint: Checkpoint, ids_ST: torch.Tensor) -> torch.Tensor:
    table = checkpoint.read(checkpoint.embedding)
    return table[ids_ST].float()


def test_tokens_are_embedded_whichever_rows_they_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_runner, "_EMBEDDED_BYTES", 1000)
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "model"))
    count = checkpoint.tensors[checkpoint.embedding].shape[0]
    runner = LayerRunner(checkpoint, CPU, torch.float32)
    for ids_ST in (
        torch.arange(count).view(1, -1),  # every row
        torch.randint(count, (3, 70), generator=torch.Generator().manual_seed(0)),
        torch.tensor([[count - 1, 0, count - 1, 0], [7, 7, 7, 7]]),
    ):
        assert torch.equal(runner.embed(ids_ST), embedded(checkpoint, ids_ST))
