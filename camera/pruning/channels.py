"""The values of some FFN channels, where channels are the last dimension."""

import torch


def of_channels(values: torch.Tensor, kept_K: torch.Tensor) -> torch.Tensor:
    """Values [..., F] of the channels int64 [K], contiguous [..., K]; the same bits.

    On the CPU torch gathers integers and float32 three times as fast as it indexes, and half floats as slowly.
    """
    if values.device.type != "cpu":
        return values.index_select(-1, kept_K)
    bits = values.view(torch.int16) if values.itemsize == 2 else values
    return bits.gather(-1, kept_K.expand(*values.shape[:-1], -1)).view(values.dtype)
