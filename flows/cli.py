"""The command line `camera`. Heavy imports happen inside the commands, so that help shows at once."""

import sys
from collections.abc import Callable

import typer

from camera import shutdown
from flows.commands import (
    cleaning,
    inspecting,
    measuring,
    packing,
    pipeline,
    pruning,
    registry,
    serving,
    sweeping,
)

app = typer.Typer(
    name="camera",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compress large language models for Ascend NPUs: prune, quantise, measure, publish.\n\n"
    "A whole run:  `camera run recipes/demo.yaml`\n\n"
    "One stage:  `camera prune MODEL OUT --calibration stdlib --ratio 0.2`",
)
_PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "The pipeline": (pipeline.run, pipeline.plan, sweeping.sweep),
    "Single stages: paths in, paths out": (
        pruning.capture,
        pruning.score,
        pruning.prune,
        pruning.save,
        packing.imatrix,
        packing.quantize,
        packing.convert,
        measuring.evaluate,
        measuring.bench,
    ),
    "Every night": (serving.serve, serving.automations),
    "Published models": (registry.runs, registry.show, registry.sign, registry.promote, registry.rollback),
    "Looking closer": (inspecting.audit, inspecting.diff, cleaning.gc, inspecting.doctor),
}
for panel, commands in _PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)


def main() -> None:
    """Run a command. What a user can mend is one message and exit code 2; an interruption is 130."""
    shutdown.install()
    code = 1  # of an error that nobody expects, which Python shows
    try:
        code = _run()
    finally:
        shutdown.finish(code)
    sys.exit(code)


def _run() -> int:
    """Run a command to its end; the exit code."""
    try:
        app()
        return 0
    except KeyboardInterrupt:
        return _stopped()
    except SystemExit as ended:  # typer's own end; of a KeyboardInterrupt it makes 130
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        return _stopped() if code not in _COMPLETE and shutdown.requested() else code
    except Exception as error:
        if shutdown.requested():  # what a library makes of an interruption
            return _stopped()
        from camera.disk import disk_error  # only on the way out
        from camera.errors import CameraError
        from camera.secrets import without_secrets

        told = disk_error(error) if isinstance(error, OSError) else error
        if not isinstance(told, CameraError):
            raise
        _say(f"camera: {without_secrets(str(told))}")
        return 2


_COMPLETE = (0, 3)
"""Exit codes of commands that did all they were asked to."""


def _stopped() -> int:
    _say("stopped; run the same command again to go on from here")
    return shutdown.EXIT_CODE


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")


if __name__ == "__main__":
    main()
