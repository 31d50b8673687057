"""Whether a build of llama.cpp computes on this device, and computes what the weights say: before it is timed."""

from camera.device_check.context import Context
from camera.device_check.schema import Measurement
from camera.engines.parts.llama_build import find_build
from camera.engines.parts.llama_probe import (
    PERPLEXITY,
    RIGHT_KL,
    distance_of,
    layer_flags,
    probe_build,
    write_tiny,
)
from camera.errors import CameraError


def run(context: Context, build: str) -> None:
    """Compare the log-probabilities of a tiny model with those of its weights.

    Args:
        context: of the step.
        build: the option that names the build; only `llama_cpp` is asked to read Q4_0_64.

    Raises:
        CameraError: if the build would compute elsewhere, or cannot be asked.
    """
    layers = layer_flags(context.device)
    found = find_build(getattr(context.options, build), build)
    probe = probe_build(found, context.device)
    context.tell(backends=probe.backends, execution_mode=probe.execution_mode)
    if (reason := probe.why_not_on(context.options.kind)) is not None:
        raise CameraError(reason)
    if (program := found.beside(PERPLEXITY)) is None:
        raise CameraError(f"the build has no {PERPLEXITY} beside llama-bench: build that too")
    file, twin = write_tiny(context.scratch)
    for type, path in (("Q4_0", twin), *([("Q4_0_64", file)] if build == "llama_cpp" else [])):
        what, of = "distance from what the weights say", {"type": type}
        try:
            value = distance_of(program, layers, path)
        except CameraError as error:
            context.add(Measurement(what=what, of=of, error=str(error)))
            continue
        context.add(Measurement(what=what, of=of, value=value, unit="nats", at_most=RIGHT_KL))
