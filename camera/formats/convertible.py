"""Whether a model can become a GGUF file: asked of a checkpoint before the work, and of packed tensors after it."""

from collections.abc import Callable
from typing import TypeVar

import gguf

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError, understood
from camera.formats.gguf_tensors import refuse_strange
from camera.formats.gguf_tokenizer import write_tokenizer
from camera.formats.gguf_writer import KeyWriter, OutputTensor
from camera.formats.model_keys import Described, write_model_keys

T = TypeVar("T")


def check_convertible(checkpoint: Checkpoint) -> list[str]:
    """Ask everything that `convert_to_gguf` asks of a model, whatever becomes of its weights.

    Returns:
        what the user should know of such a file, a sentence each.

    Raises:
        CameraError: with every reason for which there is no GGUF file of this model.
    """
    writer = KeyWriter(None, architecture(checkpoint))  # nothing is written
    warnings, _ = describe(writer, checkpoint, set(checkpoint.needed))
    writer.check(str(checkpoint.folder))
    return warnings


def architecture(model: Described) -> str:
    """llama.cpp's name of a model's architecture.

    Raises:
        CameraError: if it has none.
    """
    name = model.family.gguf_architecture
    if name is None:
        raise CameraError(
            f"{model.folder} is a {model.family.model_type}, and llama.cpp has no architecture that computes it: "
            "there is no GGUF file of such a model"
        )
    return name


def describe(
    writer: gguf.GGUFWriter, model: Described, names: set[str]
) -> tuple[list[str], list[OutputTensor]]:
    """Add everything to a file that its tensors do not hold: the architecture's keys, and the tokenizer.

    Args:
        writer: of the file.
        model: a checkpoint, or a folder of packed tensors.
        names: of the tensors that the file is to hold.

    Returns:
        what the user should know, a sentence each; and tensors that are computed from the config, to stand first.

    Raises:
        CameraError: with every reason for which there is no GGUF file of this model.
    """
    reasons: list[str] = []

    def ask(question: Callable[[], T], otherwise: T) -> T:
        try:
            with understood(str(model.folder)):
                return question()
        except CameraError as error:
            reasons.append(str(error))
            return otherwise

    ask(lambda: _refuse_by_rules(model), None)
    ask(lambda: refuse_strange(model, names), None)
    nothing: tuple[list[str], list[OutputTensor]] = ([], [])
    warnings, computed = ask(lambda: write_model_keys(writer, model), nothing)
    rows = model.tensors[model.family.name("embedding")].shape[0]
    warnings = warnings + ask(lambda: write_tokenizer(writer, model.folder, rows), nothing[0])
    if len(reasons) > 1:
        raise CameraError(
            f"there is no GGUF file of {model.folder}, for {len(reasons)} reasons:\n- " + "\n- ".join(reasons)
        )
    if reasons:
        where = "" if str(model.folder) in reasons[0] else f"{model.folder}: "
        raise CameraError(f"{where}{reasons[0]}")
    return warnings, computed


def _refuse_by_rules(model: Described) -> None:
    if (reason := model.family.gguf_rules.problem(model.config)) is not None:
        raise CameraError(
            f"{model.folder}: llama.cpp would not load a GGUF file of this model, or compute another: {reason}"
        )
