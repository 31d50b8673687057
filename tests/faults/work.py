"""What the processes of these tests do. They are forked from a server that has imported everything once."""

import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import transformers.models.llama.modeling_llama
import transformers.models.llama.tokenization_llama  # noqa: F401 (imported once, before the forks)

from camera.errors import CameraError
from camera.layerwise import resume
from flows.without_prefect import compress
from tasks.pipeline import Pipeline
from tasks.project import Project
from tasks.recipe import load_recipe
from tasks.store import Artifact
from tests.faults.deaths import Deaths

TOLD = "told.json"


class Teller:
    """A listener that keeps what became of each step, and may start a countdown at one of them."""

    def __init__(
        self,
        deaths: Deaths | None = None,
        step: str | None = None,
        number: int | None = None,
        fill: str | None = None,
        kill_group: int | None = None,
    ) -> None:
        self.states: dict[str, str] = {}
        self.operations: dict[str, int] = {}
        self._deaths, self._step, self._number, self._fill = deaths, step, number, fill
        self._kill_group = kill_group

    def begin(self, pipeline: Pipeline) -> None: ...

    def started(self, step: str) -> None:
        if step == self._step and self._kill_group is not None:
            os.killpg(self._kill_group, signal.SIGKILL)
        if step == self._step and self._fill is not None:
            with (Path(self._fill) / "ballast").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self._fill).free - 4096)
        if self._deaths is not None:
            self._deaths.count = 0
            if step == self._step:
                self._deaths.last = self._number

    def waiting(self, step: str) -> None:
        self.states[step] = "waited"

    def progress(self, step: str, done: int, total: int) -> None: ...

    def finished(self, step: str, artifact: Artifact, cached: bool) -> None:
        self.states[step] = "cached" if cached else "done"
        if self._deaths is not None:
            self.operations[step] = self._deaths.count

    def failed(self, step: str, error: BaseException) -> None:
        self.states[step] = "failed"


def run_recipe(
    folder: Path,
    overrides: tuple[str, ...] = (),
    step: str | None = None,
    number: int | None = None,
    power: bool = False,
    environment: dict[str, str] | None = None,
    fill: str | None = None,
    kill_group: int | None = None,
    told: str = TOLD,
) -> None:
    """Run `recipe.yaml` of a folder as `camera run --no-prefect` does; write `told.json` unless ended before.

    Args:
        folder: a workplace.
        overrides: `section.key=value`.
        step, number: end the process at this file operation of this step.
        power: end it as a power cut would.
        environment: variables to set before.
        fill: take all room of this file system when the step starts.
        kill_group: kill the processes of this group when the step starts.
        told: name of the file to write.
    """
    os.chdir(folder)
    os.environ.update({"CAMERA_HOME": ".camera", **(environment or {})})
    resume.RULE = resume.SaveRule(0, 1e9)  # these layers take no minute
    Project.here().configure()
    store = folder / ".camera" / "store"
    store.mkdir(parents=True, exist_ok=True)
    teller = Teller(Deaths((store, folder / "published"), power).watch(), step, number, fill, kill_group)
    said: dict[str, Any] = {"error": None, "kind": None}
    with (folder / "output.txt").open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        compress(load_recipe(Path("recipe.yaml"), overrides), teller)
    except CameraError as error:
        said |= {"error": str(error), "kind": type(error).__name__}
    except BaseException as error:
        traceback.print_exc()
        said |= {"error": repr(error), "kind": type(error).__name__}
    said |= {"states": teller.states, "operations": teller.operations}
    (folder / told).write_text(json.dumps(said))
    sys.exit(0 if said["error"] is None else 1)
