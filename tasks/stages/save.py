"""HF save as a stage."""

from camera.checkpoints.checkpoint import Checkpoint
from camera.options import Options
from camera.pruning.stages import save
from camera.report.card import write_card
from tasks.estimate import Known, Needs
from tasks.stage import Context, Stage, register


class SaveOptions(Options):
    """What the model card says."""

    base_model: str


def run(context: Context) -> dict[str, float]:
    source = Checkpoint.open(context.inputs["model"])
    save(source, context.inputs["pruned"], context.out, context.progress)
    base_model = context.options.of(SaveOptions).base_model
    write_card(context.out, source, context.inputs["pruned"], base_model=base_model, lineage=True)
    infos = Checkpoint.open(context.out).needed.values()
    return {
        "bytes": sum(info.size_bytes for info in infos),
        "parameters": sum(info.size_bytes // info.dtype.itemsize for info in infos),
    }


def needs(known: Known) -> Needs:
    """The source model without the feed-forward channels that go; a mask keeps its size."""
    masked = known.recipe.prune.mode == "mask"
    gone = 0 if masked else known.feed_forward - known.kept_bytes
    return Needs(disk=known.whole - gone, memory=2 * known.largest)


STAGE = register(Stage("save", 4, run, {"card": SaveOptions}, needs, intermediate=True, part="saved"))
