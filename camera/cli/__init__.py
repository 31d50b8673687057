"""The command line `camera`. Heavy imports happen inside the commands, so that help shows at once."""

import errno
import sys
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
import typer.rich_utils
from typer.core import TyperCommand

from camera import shutdown
from camera.cli.doctor import doctor
from camera.cli.npu_check import NPU_CHECK
from camera.cli.options import command_help, stage_command
from camera.cli.output import note
from camera.cli.stages import STAGES, Stage
from camera.cli.streams import lasting
from camera.errors import CameraError
from camera.escape import one_line
from camera.guarded import panics_are_errors
from camera.logs import harmless_logs

_CHECKOUT = Path(__file__).resolve().parents[2]
PIPELINE_COMMANDS = (
    *("run", "plan", "sweep", "serve", "automations", "runs", "show", "sign", "promote", "rollback"),
    *("audit", "diff", "gc"),
)
"""The pipeline's commands: `flows.commands`, which is used from a checkout with the extra `pipeline`."""
_NO_PIPELINE = (
    "is a command of the pipeline, which is used from a checkout of the repository: there, "
    "`pip install -e '.[pipeline]'`"
)
_REMOVED = {
    "--score": "write --method obs in place of --score obs --refit; CAMERA's own choice is the default",
    "--refit": "write --method refit, or --method obs in place of --score obs --refit",
    "--steps": "leave it out: pruning in steps cost as many runs and gave the same model quality",
    **dict.fromkeys(
        ("--allocation", "--allocation-bound", "--allocation-windows"),
        "leave it out: one width for all layers is smaller and faster at the same quality",
    ),
    "--sparsity-pattern": "leave it out: --sparsity is unstructured",
    "--llama-cpp-reads-q4-0-64": "leave it out: the build itself is asked, with a tiny model",
    "--sort-channels": "leave it out: sorted channels brought no better 4-bit model",
}
"""Flags that were removed, and what to write instead."""
_OF_PATHS = (
    *(errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
    *(errno.EINVAL, errno.EILSEQ, errno.EIO),
)
"""Errors of the system that are about the path that was named."""
_LONGEST_PATH = 400
_COMPLETE = (0, 3)
"""Exit codes of commands that did all they were asked to."""
_SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "add_completion": False,
    "rich_markup_mode": "markdown",
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


class _Late(TyperCommand):
    """A command in the list, whose flags are made when it is called: the option models take time to import."""

    def __init__(self, stage: Stage | None, **settings: Any) -> None:
        super().__init__(**settings)
        self._stage = stage

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if self._stage is None:
            raise CameraError(f"camera {self.name} {_NO_PIPELINE}")
        for flag in (argument.partition("=")[0] for argument in args):
            if flag in _REMOVED:
                raise CameraError(f"{flag} was removed: {_REMOVED[flag]}")
        alone = typer.Typer(**{**_SETTINGS, "no_args_is_help": False})
        alone.command(self.name)(stage_command(self._stage))
        return typer.main.get_command(alone).make_context(info_name, args, parent, **extra)


@cache
def pipeline() -> Any:
    """The module `flows.commands`, if this is a checkout in which the pipeline is installed; else None."""
    if not (_CHECKOUT / "flows" / "commands").is_dir() or not all(
        map(find_spec, ("prefect", "mlflow", "dvc"))
    ):
        return None
    if sys.path[0] != str(_CHECKOUT):  # before another distribution's `tasks` or `flows`
        sys.path.insert(0, str(_CHECKOUT))
    return import_module("flows.commands")


def command_line() -> typer.Typer:
    """All commands, those of the pipeline among them where it is installed."""
    joined = pipeline()
    app = typer.Typer(
        name="camera",
        help="Compress large language models for Ascend NPUs: prune, quantise, measure, publish.\n\n"
        "A whole run: `camera run recipes/demo.yaml`\n\n"
        "One stage: `camera prune MODEL OUT --calibration stdlib --ratio 0.2`",
        epilog=None if joined else f"`camera {'`, `camera '.join(PIPELINE_COMMANDS)}`: each {_NO_PIPELINE}.",
        **_SETTINGS,
    )
    panels = joined.PANELS if joined else {}
    for panel, functions in {**panels, "This machine": (doctor,)}.items():
        for function in functions:
            app.command(rich_help_panel=panel)(function)
    single = "Single stages: paths in, paths out"
    for stage, panel in ((NPU_CHECK, "This machine"), *((each, single) for each in STAGES)):
        late: Any = partial(_Late, stage)
        documented = app.command(stage.name, cls=late, help=command_help(stage.run), rich_help_panel=panel)
        documented(_no_flags)
    for name in () if joined else PIPELINE_COMMANDS:
        missing: Any = partial(_Late, None)
        app.command(name, cls=missing, hidden=True)(_no_flags)
    return app


def _no_flags() -> None:
    """Stands for a command in the list."""


def main() -> None:
    """Run a command. An error that the user can mend is one message and exit code 2; a signal is 130."""
    lasting()
    harmless_logs()
    shutdown.install()
    code = 1  # of an error that nobody expects, which Python shows
    try:
        code = _written(_run())
    finally:
        shutdown.finish(code)
    sys.exit(code)


def _run() -> int:
    """Run a command to its end; the exit code."""
    try:
        with panics_are_errors("stopped"):
            return _ended(_called())
    except KeyboardInterrupt:
        return _stopped()
    except SystemExit as ended:
        return _ended(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
    except Exception as error:
        if shutdown.requested():  # what a library makes of a signal
            return _stopped()
        from camera.ascend.causes import explain  # only on the way out
        from camera.disk import disk_error
        from camera.secrets import without_secrets

        told = (disk_error(error) or _about_a_file(error)) if isinstance(error, OSError) else error
        root = error.__cause__ or error  # torch raises its own for a backend that does not load
        cause = explain(f"{error}\n{root}")
        if cause is not None and isinstance(root, ImportError) and not isinstance(told, CameraError):
            told = CameraError(str(root))
        if not isinstance(told, CameraError):
            if cause is not None:
                error.add_note(f"camera: {cause}")  # below the traceback, which tells the operator
            raise
        text = str(told)
        if cause is not None and cause.partition(": ")[2] not in text:
            text = f"{text}: {cause}"
        note(f"camera: {without_secrets(text)}")
        return 2


def _about_a_file(error: OSError) -> Exception:
    """What the system says of a path that cannot be used, as a message; any other error as it is."""
    if error.filename is not None and error.errno in _OF_PATHS:
        return CameraError(
            f"{one_line(error.filename)[:_LONGEST_PATH]}: {error.strerror}; name another path, or change what is there"
        )
    return error


def _called() -> int:
    """Run the command; the exit code. An error of the command line is shown as typer shows it, without control characters."""
    try:
        code = typer.main.get_command(command_line())(standalone_mode=False)
    except typer.Abort:
        note("stopped")
        return 1
    except typer.TyperException as error:
        error.message = one_line(error.message)  # each that is about the command line has one
        typer.rich_utils.rich_format_error(error)  # type: ignore[arg-type]
        return int(getattr(error, "exit_code", 2))
    return code if isinstance(code, int) else 0


def _written(code: int) -> int:
    """The exit code, once all that was printed is where it was to go: a full disk has the answer cut short."""
    try:
        sys.stdout.flush()
    except OSError as error:
        note(f"camera: the output is not complete: {error.strerror}")
        return code or 2
    return code


def _ended(code: int) -> int:
    """The exit code of a command; typer makes 130 of a KeyboardInterrupt."""
    return _stopped() if code not in _COMPLETE and shutdown.requested() else code


def _stopped() -> int:
    note("stopped; run the same command again to go on from here")
    return shutdown.EXIT_CODE
