"""CAMERA: the channels of the highest importance stay, with their own weights."""

from camera.pruning.importance import kept_channels
from camera.pruning.methods import Choice, ObservedBlock
from camera.pruning.plan import PrunePlan
from camera.registry import PRUNING_METHODS


class Camera:
    """Source: CAMERA (AAAI 2026)."""

    needs_gram = False
    title = "CAMERA's micro-expert importance"

    def decide(self, block: ObservedBlock, plan: PrunePlan) -> Choice:
        return Choice(kept_channels(block.importance_F, block.kept))

    def multiplications(self, width: int, hidden: int, kept: int, dampings: int) -> int:
        return 0


PRUNING_METHODS.register("camera", Camera())
