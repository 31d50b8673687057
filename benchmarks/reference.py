"""What the arithmetic of the Ascend version of CAMERA changes: its importance and its perplexity against ours.

    python benchmarks/reference.py MODEL --text FILE

Its rules, as its scripts state them (docs/reference.md), are computed here from the same activations and logits: energies, sums and
maxima rounded to the weights' dtype before they are multiplied, the channels of the highest products kept; and for perplexity a mean
loss of each window in the logits' dtype. In float32 both must choose the same channels.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import parser_of, save, show
from torch import nn

import camera
from camera.checkpoints.tokenizer import load_tokenizer
from camera.data import calibration_windows, evaluation_tokens
from camera.evaluation.perplexity import perplexity
from camera.loading import assemble, open_source
from camera.options import CalibrationOptions, CaptureOptions, DatasetOptions
from camera.pruning.folders import Scored

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Compare, print two tables, and write JSON if asked."""
    parser = parser_of(__doc__, samples=16, length=512, ratio=0.2, reduce_ratio=0.95, window=512)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a dense checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="calibrated on, and measured")
    arguments = parser.parse_args()
    rows = [compare(arguments, dtype) for dtype in DTYPES]
    show(
        f"{arguments.model.name}: the reference's arithmetic against ours, {arguments.samples} x {arguments.length} tokens",
        "computed in | channels a layer | distinct importances, reference's | ours | kept alike, least of all layers"
        " | perplexity, reference's | ours",
        (
            (
                row["dtype"],
                str(row["channels"]),
                str(row["distinct_reference"]),
                str(row["distinct_ours"]),
                f"{row['kept_alike']:.1%}",
                f"{row['perplexity_reference']:.4f}",
                f"{row['perplexity_ours']:.4f}",
            )
            for row in rows
        ),
    )
    save(arguments.json, rows=rows)


@torch.inference_mode()
def compare(arguments: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Both importances of every layer of the whole model, and both perplexities."""
    source = open_source(arguments.model)
    model = assemble(source, DTYPES[dtype], torch.device("cpu"))
    text = CalibrationOptions(
        name="file", path=arguments.text, samples=arguments.samples, length=arguments.length, seed=1234
    )
    tokens_ST = calibration_windows(text, camera.open_checkpoint(arguments.model))
    networks = [layer.mlp for layer in model.model.layers]
    published = reference_importance(model, networks, tokens_ST, arguments.reduce_ratio)
    ours = our_importance(arguments, text, dtype, len(networks))
    width = len(published[0])
    kept = -(-(width - int(width * arguments.ratio)) // 64) * 64
    alike = [
        len({*a.topk(kept).indices.tolist()} & {*b.topk(kept).indices.tolist()}) / kept
        for a, b in zip(published, ours, strict=True)
    ]
    held_out = DatasetOptions(name="file", path=arguments.text)
    tokens_N = evaluation_tokens(held_out, load_tokenizer(arguments.model), arguments.window)
    return {
        "dtype": dtype,
        "channels": width,
        "distinct_reference": min(len(each.unique()) for each in published),
        "distinct_ours": min(len(each.unique()) for each in ours),
        "kept_alike": min(alike),
        "perplexity_reference": reference_perplexity(model, tokens_N, arguments.window),
        "perplexity_ours": perplexity(
            arguments.model, tokens_N, window=arguments.window, dtype=dtype, device="cpu"
        ).perplexity,
    }


def reference_importance(
    model: nn.Module, networks: list[Any], tokens_ST: torch.Tensor, reduce_ratio: float
) -> list[torch.Tensor]:
    """Of each layer, [F] in the weights' dtype: all samples at once, as the scripts do."""
    inputs: dict[int, torch.Tensor] = {}
    hooks = [
        network.register_forward_hook(lambda _, given, __, number=number: inputs.update({number: given[0]}))
        for number, network in enumerate(networks)
    ]
    model(tokens_ST)
    for hook in hooks:
        hook.remove()
    found = []
    for number, network in enumerate(networks):
        x_TH = inputs.pop(number).flatten(0, 1)
        a_TF = nn.functional.silu(network.gate_proj(x_TH)) * network.up_proj(x_TH)
        energy_F = network.down_proj.weight.square().sum(dim=0)
        peak_F = a_TF.abs().amax(dim=0).square()
        found.append(energy_F * ((1 - reduce_ratio) * a_TF.square().sum(dim=0) + reduce_ratio * peak_F))
    return found


def our_importance(
    arguments: argparse.Namespace, text: CalibrationOptions, dtype: str, count: int
) -> list[torch.Tensor]:
    """Of each layer, float64 [F], by the library."""
    how = CaptureOptions(propagate="one-shot", dtype=dtype, device="cpu")  # type: ignore[arg-type]
    with TemporaryDirectory() as folder:
        camera.capture(arguments.model, Path(folder, "statistics"), text, how)
        camera.score(
            arguments.model, Path(folder, "statistics"), Path(folder, "scores"), arguments.reduce_ratio
        )
        scored = Scored.read(Path(folder, "scores"), count)
    return [scores_F for blocks in scored.layers for scores_F in blocks.values()]


def reference_perplexity(model: nn.Module, tokens_N: torch.Tensor, window: int) -> float:
    """The mean loss of each window in the logits' dtype, as many times as the window has tokens."""
    windows_WT = tokens_N[: len(tokens_N) // window * window].view(-1, window)
    total = 0.0
    for window_T in windows_WT:
        logits_TV = model(window_T[None]).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits_TV, window_T[1:])) * window
    return float(torch.tensor(total / windows_WT.numel()).exp())


if __name__ == "__main__":
    main()
