"""Where the router of a sparse layer sends tokens: by the layer itself, or again with fewer experts to choose from."""

import torch
from torch import nn

from camera.layerwise.experts import Experts, Routing, attach, detach
from camera.layerwise.feed_forward import Call, Samples


def route(
    layer: nn.Module,
    call: Call,
    samples: Samples,
    experts: Experts,
    shared: str | None,
    normed_TH: torch.Tensor,
) -> Routing:
    """Run a layer over all samples without its experts: the hidden states become its residual stream.

    Args:
        layer: its module.
        call: runs it.
        samples: what enters.
        experts: of the layer.
        shared: path in the layer of the network that they share, if there is one.
        normed_TH: filled with what the router reads.
    """
    index, weight, seen = [], [], 0

    def watch(routing: Routing) -> None:
        nonlocal seen
        rows = slice(seen, seen + len(routing.hidden_TH))
        normed_TH[rows] = routing.hidden_TH.to(normed_TH.device)
        seen = rows.stop
        index.append(routing.index_TK)
        weight.append(routing.weight_TK)

    own = None if shared is None else layer.get_submodule(shared)
    if shared is not None:
        layer.set_submodule(shared, _Nothing())
    experts.watch = watch
    device = next(weight.device for weight in layer.parameters() if not weight.is_meta)
    for batch in samples.batches:
        samples.store(batch, call(layer, samples.load(batch, device)))
        samples.tell(min(batch.stop, len(samples.hidden_STH)))
    experts.watch = None
    if shared is not None and own is not None:
        layer.set_submodule(shared, own)
    return Routing(normed_TH, torch.cat(index), torch.cat(weight))


def route_again(
    sparse: nn.Module,
    experts: Experts,
    shared: str | None,
    samples: Samples,
    normed_TH: torch.Tensor,
) -> Routing:
    """Where another router sends the same normed hidden states.

    Args:
        sparse: a module of router and experts with the router's weights; it goes back to the meta device.
        experts: those that it chooses from.
        shared: name of the network in it that they share.
        samples: of the layer, for their number and length.
        normed_TH: what the first router read.
    """
    index, weight = [], []

    def watch(routing: Routing) -> None:
        index.append(routing.index_TK)
        weight.append(routing.weight_TK)

    experts.watch = watch
    module = sparse.get_submodule("experts")
    attach(module, experts)
    if shared is not None:
        sparse.set_submodule(shared, _Nothing())
    device = next(weight.device for weight in sparse.parameters() if not weight.is_meta)
    for batch_BTH in normed_TH.view_as(samples.hidden_STH).split(samples.batch_size):
        sparse(batch_BTH.to(device))
    detach(module)  # it would keep all that the router made
    sparse.to("meta")
    return Routing(normed_TH, torch.cat(index), torch.cat(weight))


def take_weights(narrower: nn.Module, whole: nn.Module, kept_E: torch.Tensor) -> None:
    """Give a module the weights of one with more experts, its rows of those that stay."""
    device = next(each.device for each in whole.state_dict().values() if not each.is_meta)
    rows = kept_E.to(device)
    wanted = narrower.state_dict()
    found = {}
    for name, tensor in whole.state_dict().items():
        if tensor.is_meta or name not in wanted:
            continue
        for dimension, size in enumerate(wanted[name].shape):
            if size != tensor.shape[dimension]:
                tensor = tensor.index_select(dimension, rows)
        found[name] = tensor
    narrower.load_state_dict(found, strict=False, assign=True)
    narrower.requires_grad_(False)


class _Nothing(nn.Module):
    """Puts out zeros."""

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_BTH)
