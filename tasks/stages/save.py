"""HF save as a stage."""

from camera.checkpoints.checkpoint import Checkpoint
from camera.pruning.stages import save
from camera.report.card import write_card
from tasks.stage import Context, Stage


def run(context: Context) -> dict[str, float]:
    source = Checkpoint.open(context.inputs["model"])
    save(source, context.inputs["pruned"], context.out, context.progress)
    write_card(context.out, source, context.inputs["pruned"], base_model=context.options["base_model"])
    infos = Checkpoint.open(context.out).needed.values()
    return {
        "bytes": sum(info.size_bytes for info in infos),
        "parameters": sum(info.size_bytes // info.dtype.itemsize for info in infos),
    }


STAGE = Stage("save", version=2, run=run)
