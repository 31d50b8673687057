"""What a step needs, estimated before its inputs exist: disk, memory, time."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

from camera.checkpoints.checkpoint import Checkpoint
from camera.models import Block
from camera.pruning.estimate import tried_layer
from camera.pruning.plan import PrunePlan, plan_prune
from tasks.options import Sections
from tasks.recipe import Recipe

PROCESS_BYTES = 680 << 20
"""Resident in the process of a run before any weight: 400 MiB are Python, torch for the CPU and transformers with the
modules of a model's layers; MLflow adds 180, Prefect 90, and what the stages import the rest."""


@dataclass(frozen=True)
class Needs:
    """About what a step needs."""

    disk: int = 0
    """Bytes that it writes."""
    memory: int = 0
    """Bytes at its peak, beside `PROCESS_BYTES`."""
    seconds: float | None = None
    """Only of a step that was tried."""
    in_store: bool = True
    """Whether it writes to the store, and not to a place of its own."""


@dataclass(frozen=True)
class Known:
    """What an estimate starts from: tensor shapes, the recipe, and the estimates of the steps before."""

    recipe: Recipe
    source: Checkpoint
    """The model that the recipe starts from."""
    options: Sections = field(default_factory=Sections)
    """Of the step."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the step's inputs, by its names for them."""

    def size(self, name: str) -> int:
        """Bytes of an input."""
        return self.sizes[name]

    @cached_property
    def tensor_bytes(self) -> dict[str, int]:
        """Of every tensor of the source model."""
        return {name: info.size_bytes for name, info in self.source.needed.items()}

    @cached_property
    def whole(self) -> int:
        """Bytes of the source model."""
        return sum(self.tensor_bytes.values())

    @cached_property
    def elements(self) -> int:
        """Weights of the source model."""
        return self.whole // self.source.dtype.itemsize

    @cached_property
    def feed_forward(self) -> int:
        """Bytes of the feed-forward matrices of the source model; all experts are counted."""
        return sum(size for _, size in self._networks)

    @cached_property
    def channels(self) -> int:
        """Channels of all feed-forward networks of the source model."""
        config = self.source.config
        return sum(block.width(config) for block, _ in self._networks)

    @cached_property
    def _networks(self) -> list[tuple[Block, int]]:
        """The feed-forward networks of all layers, with their bytes."""
        blocks = chain.from_iterable(map(self.source.blocks, range(self.source.layer_count)))
        return [(block, sum(self.tensor_bytes[name] for name in block.names)) for block in blocks]

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest tensor of the source model."""
        return max(self.tensor_bytes.values())

    @cached_property
    def layer(self) -> int:
        """Bytes of a decoder layer of the source model as it is held; of experts one is at a time."""
        layer = tried_layer(self.source)
        experts = [block for block in self.source.blocks(layer) if block.expert is not None]
        apart = {name for block in experts[1:] for name in block.names}
        return sum(self.tensor_bytes[name] for name in self.source.layer_tensors(layer) if name not in apart)

    @cached_property
    def pruning(self) -> PrunePlan:
        """What the recipe prunes."""
        return plan_prune(self.source, self.recipe.capture, self.recipe.prune)

    @cached_property
    def kept_bytes(self) -> int:
        """Bytes of the feed-forward matrices that stay; where a split is still to be chosen, of the largest."""
        kinds: Counter[tuple[str, bool]] = Counter()
        for block, size in self._networks:
            kinds[block.width_key, block.expert is not None] += size
        plan = self.pruning
        plans = [plan.narrowed_to(*candidate) for candidate in plan.candidates] or [plan]
        return round(max(sum(size * _share(each, *kind) for kind, size in kinds.items()) for each in plans))

    @property
    def new_matrices(self) -> int:
        """Bytes of the matrices that are no slices of the source's: down projections of a method, all if sparse."""
        if self.pruning.sparsity:
            return self.kept_bytes
        return self.kept_bytes // 3 if self.pruning.needs_gram else 0

    @property
    def tokens(self) -> int:
        """Of the calibration."""
        return self.recipe.calibration.samples * self.recipe.calibration.length


def _share(plan: PrunePlan, width_key: str, is_expert: bool) -> float:
    """Which share of networks of one kind stays."""
    experts = plan.experts_kept / plan.experts if is_expert else 1.0
    kept = (cut.kept / cut.width for cut in plan.cuts if cut.key == width_key)
    return experts * next(kept, 1.0)
