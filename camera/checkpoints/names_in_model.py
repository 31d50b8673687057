"""What transformers calls the tensors of a checkpoint, and what it computes in float32 whatever the rest is in."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def names_in_model(model: "PreTrainedModel") -> Callable[[str], str]:
    """From a tensor's name in a checkpoint to its name in transformers' model, which calls some modules otherwise.

    Matrices of experts have no name there: transformers holds those of a layer as one parameter.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping  # heavy; only computing needs it
    from transformers.core_model_loading import WeightRenaming

    mapping = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]

    def rename(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    return rename


def dtype_in_model(model: "PreTrainedModel", name: str, built: torch.dtype) -> torch.dtype:
    """What transformers holds a tensor in: float32 for correction biases and some routers.

    Args:
        model: of transformers, built in the dtype that is asked for.
        name: of the tensor in it.
        built: the dtype that it was built with there, which some modules choose themselves.
    """
    exact = set(model._keep_in_fp32_modules_strict or ())
    if built == torch.float16:
        exact |= set(model._keep_in_fp32_modules or ())
    return torch.float32 if any(part in name for part in exact) else built
