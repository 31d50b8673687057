"""Host and versions: what every figure depends on, and whether the card is free. Imports no torch."""

import os
import platform
import shutil

import psutil

from camera.ascend.host import facts
from camera.device_check.context import Context
from camera.errors import CameraError
from camera.versions import versions

_BLOCKING = "ASCEND_LAUNCH_BLOCKING"


def run(context: Context) -> None:
    """Tell `identity`, which decides whether earlier results hold, and what is of interest beside it.

    Raises:
        CameraError: if the card is in use, or the environment falsifies times.
    """
    found = facts()
    settings = {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "MKL_"))}
    context.tell(
        identity={
            **found.model_dump(mode="json", exclude={"cards", "npu_smi"}),
            "environment": found.environment | settings,
            "python": platform.python_version(),
            "packages": versions(),
            "cores": psutil.cpu_count(),
            "kernel": platform.release(),
        },
        cards=[card.model_dump(mode="json", exclude={"processes"}) for card in found.cards],
        npu_smi=found.npu_smi,
        unpaired=found.unpaired,
    )
    context.measure("memory of the host", psutil.virtual_memory().total, "B")
    context.measure("free memory of the host", psutil.virtual_memory().available, "B")
    context.measure("free disk", shutil.disk_usage(context.scratch).free, "B")
    if context.options.kind != "npu":
        return
    if os.environ.get(_BLOCKING, "0") != "0":
        raise CameraError(f"{_BLOCKING} is set, with which every time is another: unset it")
    index = int(context.options.device.partition(":")[2] or 0)
    if index < len(found.cards) and (busy := found.cards[index].why_busy()):
        raise CameraError(f"{busy}: what would be measured is not this card's; wait, or take another (npu:N)")
