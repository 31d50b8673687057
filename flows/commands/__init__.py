"""The pipeline's commands, by what they are for; `camera.cli` takes them from here. Only light imports at the top."""

from collections.abc import Callable

from flows.commands import cleaning, inspecting, pipeline, registry, serving, sweeping
from flows.commands.inspecting import places

__all__ = ["PANELS", "places"]

PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "The pipeline": (pipeline.run, pipeline.plan, sweeping.sweep),
    "Every night": (serving.serve, serving.automations),
    "Published models": (registry.runs, registry.show, registry.sign, registry.promote, registry.rollback),
    "Looking closer": (inspecting.audit, inspecting.diff, cleaning.gc),
}
