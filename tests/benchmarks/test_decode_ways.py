"""Every way of decoding is timed, and those of the engine launch less than transformers' forward."""

import argparse
from pathlib import Path

import decode_ways
import torch

from tests.tiny import tiny_checkpoint


def test_every_way_is_timed_and_joined_layers_launch_less(tmp_path: Path) -> None:
    arguments = argparse.Namespace(prompt=4, decode=6, repeats=2)
    rows = decode_ways.measure(tiny_checkpoint(tmp_path / "model"), torch.device("cpu"), arguments)
    assert [row["way"] for row in rows] == [decode_ways.PLAIN, decode_ways.JOINED, "fixed step"]
    launches = [row["launches"] for row in rows]
    assert (
        launches[1] == launches[0] - 2 * 3
    )  # of each layer two of query, key and value, and one of gate and up
    assert all(row["ms"].low > 0 for row in rows)
