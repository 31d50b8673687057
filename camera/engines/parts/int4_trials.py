"""Trials of an NPU's int4 operator: which layout of weights is right for a shape, and how fast each is.

A device exception poisons the process that meets it, so each layout, with each `inner_precise`, has a process of its own,
which goes through all shapes; after a failure or a time-out a new one goes on with the next shape. One process for each
shape would be as safe and take longer: a process needs many seconds to import torch_npu and open the device, a trial one.

What was found is kept in the user's cache folder for this card and these versions.
"""

import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import platformdirs
import torch
from pydantic import BaseModel, ValidationError

from camera import __version__
from camera.ascend.host import facts
from camera.devices import resolve_device
from camera.engines.parts.graph import FAILURES
from camera.engines.parts.int4_measure import TOKENS
from camera.engines.parts.int4_npu import LAYOUTS
from camera.engines.parts.int4_trial import Key, Shape, Trial, TrialBench, Variant
from camera.errors import CameraError
from camera.files import write_json

log = logging.getLogger(__name__)

VARIANTS = tuple(Variant(layout, precise) for layout in LAYOUTS for precise in (0, 1))
_START_SECONDS, _TRIAL_SECONDS, _END_SECONDS = 300.0, 60.0, 10.0
"""What a process may take to open the device, for one trial, and to end."""
_MOST_LOST = 2
"""Shapes at which a variant may lose its process; then it is given up."""
_PASSING = re.compile(r"out of memory|\b(EL0004|207001|507033)\b")
"""In the reason of a failure: what another user of the card may be the cause of, so that it is not kept."""
_PROGRAM = f"import sys; from {__name__} import work; work(int(sys.argv[1]))"
"""What a process runs; `multiprocessing` would run the caller's own program again, up to where it came to here."""
_TOLD_CHARACTERS = 500
"""Of what a process said last, in the reason of its failure."""


class TrialsError(CameraError):
    """No process could be started that computes on the device."""


class _Kept(BaseModel):
    """The cache file."""

    identity: dict[str, str | None]
    trials: list[Trial]


def try_layouts(
    shapes: Sequence[Shape],
    device: torch.device,
    tokens: Sequence[int] = TOKENS,
    *,
    fresh: bool = False,
    tell: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Try every layout that takes a shape, or read what an earlier try found.

    Args:
        shapes: of matrices.
        device: an NPU.
        tokens: how many at once.
        fresh: try again what is known.
        tell: called with each that is tried now.

    Returns:
        what was found for every layout, `inner_precise`, shape and number of tokens; of a layout that does not take a shape
        the error says why.

    Raises:
        TrialsError: if no process can be started that computes on the device.
    """
    identity = _identity(device)
    found = {trial.key: trial for trial in _known(cache_file(identity), identity)}
    wanted = [Key(*variant, *shape, count) for variant in VARIANTS for shape in shapes for count in tokens]
    missing = [key for key in wanted if fresh or key not in found]
    try:
        for variant in VARIANTS:
            for trial in _tried([key for key in missing if key.variant == variant], device):
                log.info("int4 kernels: %s", trial)
                found[trial.key] = trial
                tell(trial)
    finally:
        if missing:
            _keep(identity, list(found.values()))
    return [found[key] for key in wanted]


def fastest(trials: Sequence[Trial], shape: Shape) -> Trial | None:
    """Of the variants that are right for a shape with any number of tokens, the trial of the one that is fastest with one.

    A time with launches in it is no equal of a recorded one, so a variant that could be recorded comes first.
    """
    ours = [trial for trial in trials if trial.key.shape == shape]
    wrong = {trial.key.variant for trial in ours if trial.error}
    single = [trial for trial in ours if trial.tokens == 1 and trial.key.variant not in wrong]
    return min(
        single,
        key=lambda trial: (not trial.recorded, trial.microseconds or float("inf")),
        default=None,
    )


def cache_file(identity: Mapping[str, str | None]) -> Path:
    """Where the trials of a card are kept."""
    card = re.sub(r"[^\w.-]+", "-", identity["card"] or "npu")
    return platformdirs.user_cache_path("camera-npu") / f"int4-{card}.json"


def _identity(device: torch.device) -> dict[str, str | None]:
    """What decides how fast a kernel is, and whether it is right."""
    host = facts()
    return {
        "card": str(torch.get_device_module(device.type).get_device_name(device)),
        "camera": __version__,
        "torch": host.torch,
        "torch_npu": host.torch_npu,
        "cann": host.cann,
        "driver": host.driver,
    }


def _known(file: Path, identity: Mapping[str, str | None]) -> list[Trial]:
    """What is kept of this card and these versions; nothing if the file is of others, or damaged."""
    try:
        kept = _Kept.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return []
    return kept.trials if kept.identity == identity else []


def _keep(identity: dict[str, str | None], trials: Sequence[Trial]) -> None:
    """Write the cache file, without what a busy card may be the cause of: shapes for which nothing was right, and more."""
    right = {trial.key.shape for trial in trials if trial.error is None}
    lasting = [
        trial for trial in trials if trial.key.shape in right and not _PASSING.search(trial.error or "")
    ]
    kept = _Kept(identity=identity, trials=lasting)
    try:
        write_json(cache_file(identity), kept.model_dump())
    except CameraError as error:
        log.warning("trials of int4 kernels are not kept: %s", error)


def _tried(keys: Sequence[Key], device: torch.device) -> Iterator[Trial]:
    """The trials of one variant, in as few processes as survive."""
    worker: _Worker | None = None
    failed: dict[Shape, str] = {}
    try:
        for key in keys:
            reason = LAYOUTS[key.layout].why_not(*key.shape) or failed.get(key.shape)
            if reason is None and len(failed) == _MOST_LOST:
                reason = (
                    f"not tried: {_MOST_LOST} shapes failed, the last with this: {list(failed.values())[-1]}"
                )
            if reason is None:
                worker = worker or _Worker(device)
                answer = worker.ask(key)
                if isinstance(answer, Trial):
                    yield answer
                    continue
                worker.close()
                worker, reason = None, answer
                failed[key.shape] = f"failed with {key.tokens} tokens: {answer}"
            yield key.failed(reason)
    finally:
        if worker is not None:
            worker.close()


class _Worker:
    """A process that tries layouts on a device."""

    def __init__(self, device: torch.device) -> None:
        """Raises TrialsError if it cannot open the device."""
        self._connection, theirs = Pipe()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._said,
        )
        theirs.close()
        answer = self._exchange(str(device), _START_SECONDS)
        if answer is not None:
            self.close()
            raise TrialsError(f"no process for trials can be started on {device}: {answer}")

    def ask(self, key: Key) -> Trial | str:
        """A trial, or why there is none; no other can be asked for then."""
        answer: Trial | str = self._exchange(key, _TRIAL_SECONDS)
        return answer

    def close(self) -> None:
        """End the process, by force if it hangs."""
        self._connection.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()

    def _exchange(self, message: Any, seconds: float) -> Any:
        """The answer to a message, or why there is none."""
        try:
            self._connection.send(message)
            if self._connection.poll(seconds):
                return self._connection.recv()
        except (OSError, EOFError):
            code = self._process.wait()
            self._said.seek(0)
            last = self._said.read().decode(errors="replace").strip()[-_TOLD_CHARACTERS:]
            return f"its process ended with {code}: {last}"
        return f"its process gave no answer for {seconds:.0f} s"


def work(descriptor: int) -> NoReturn:
    """What a process of trials does: it answers on a connection until that is closed, or the device fails."""
    connection = Connection(descriptor)
    try:
        bench = TrialBench(resolve_device(connection.recv()))
        connection.send(None)
        while True:
            connection.send(bench.trial(connection.recv()))
    except EOFError:
        pass
    except FAILURES as error:
        connection.send(f"{type(error).__name__}: {error}"[:_TOLD_CHARACTERS])
    finally:
        os._exit(0)  # torch_npu takes seconds to leave, and for ever where the device has failed
