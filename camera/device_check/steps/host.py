"""Host and versions: what every figure depends on, and whether the card is free. Imports no torch."""

import os
import platform
import shutil

import psutil

from camera.ascend.host import facts
from camera.blocking import blocking
from camera.device_check.context import Context
from camera.errors import CameraError
from camera.versions import versions


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
    if (name := blocking(context.options.kind)) is not None:
        raise CameraError(f"{name} is set, with which every time is another: unset it")
    if context.options.kind != "npu":
        return
    number = int(context.options.device.partition(":")[2] or 0)
    if number < len(found.visible) and (busy := found.visible[number].why_busy()):
        raise CameraError(f"{busy}: what would be measured is not this card's; wait, or take another (npu:N)")
