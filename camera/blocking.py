"""Variables that make the host wait for every launch: one finds a failing operator with them, and no time means anything."""

import os
from collections.abc import Mapping

_VARIABLES = {"npu": "ASCEND_LAUNCH_BLOCKING", "cuda": "CUDA_LAUNCH_BLOCKING"}


def blocking(kind: str, environment: Mapping[str, str] | None = None) -> str | None:
    """The variable that makes the host wait for every launch of a kind of device, if it is set; else None."""
    given = os.environ if environment is None else environment
    name = _VARIABLES.get(kind)
    return name if name is not None and given.get(name, "0") not in ("", "0") else None
