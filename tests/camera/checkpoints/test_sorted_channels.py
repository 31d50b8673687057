from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.sorted_channels import SortedChannels
from tests.tiny import MODEL_TYPES, TOKENS, tiny_checkpoint


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_model_computes_what_it_computed_before(tmp_path: Path, model_type: str) -> None:
    source = Checkpoint.open(tiny_checkpoint(tmp_path, model_type))
    view = SortedChannels.of(source)
    model = source.load_model(torch.float64)
    tokens = torch.randint(3, TOKENS, (2, 40), generator=torch.Generator().manual_seed(0))
    changed = {name for name in source.needed if not torch.equal(source.read(name), view.read(name))}
    assert changed == {name for layer in range(2) for name in source.family.ffn_names(layer)}
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        model.load_state_dict({name: view.read(name) for name in source.needed}, strict=False)
        torch.testing.assert_close(model(input_ids=tokens).logits, before, rtol=1e-12, atol=1e-12)


def test_channels_stand_in_descending_order_of_their_down_column(tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_checkpoint(tmp_path))
    gate, up, down = source.family.ffn_names(1)
    view = SortedChannels.of(source)
    size_F = view.read(down).square().sum(0)
    assert (size_F.diff() <= 0).all()
    first = source.read(down).square().sum(0).argmax()
    assert torch.equal(view.read(gate)[0], source.read(gate)[first])
    assert torch.equal(view.read_finite(up)[0], source.read(up)[first])


def test_columns_go_where_the_matrix_columns_went(tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_checkpoint(tmp_path))
    view = SortedChannels.of(source)
    gate, _, down = source.family.ffn_names(0)
    size_F = source.read(down).square().sum(0)
    assert torch.equal(view.sort_columns(down, size_F), view.read(down).square().sum(0))
    assert torch.equal(view.sort_columns(gate, size_F), size_F)


def test_a_sorted_view_is_not_sorted_again(tmp_path: Path) -> None:
    view = SortedChannels.of(Checkpoint.open(tiny_checkpoint(tmp_path)))
    assert SortedChannels.of(view) is view
