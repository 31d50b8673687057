"""An alias is given to what was audited, and whatever the moment of a kill, `rollback` knows who had it before."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from camera.errors import CameraError
from tasks import registry
from tasks.held import held
from tasks.mlflow_client import connect
from tasks.promotion import Holder, history, previous_holder, promote
from tests.tasks.test_signing import publication


@pytest.fixture
def versions(database: str, tmp_path: Path) -> Iterator[list[registry.Version]]:
    """Three versions of a model, each in a folder of its own."""
    client = connect()
    run = client.create_run("0").info.run_id
    for number in range(3):
        folder = tmp_path / f"promoted-{number}"
        lineage = publication(folder, recipe={"of": str(number), "place": str(tmp_path)})
        (folder / "results.json").write_text(RESULTS)
        registry.register("promoted", folder, lineage, None, "candidate", run)
    yield sorted(registry.versions("promoted"), key=lambda version: version.number)
    client.delete_registered_model("promoted")


RESULTS = json.dumps(
    {
        "name": "tiny",
        "base_model": "tiny",
        "model_type": "qwen2",
        "layers": 1,
        "hidden_size": 64,
        "recipe": {},
        "models": [],
    }
)


def right(folder: Path) -> list[str]:
    return []


def holders() -> list[int]:
    return [holder.version for holder in history("promoted")]


class Killed(BaseException):
    """What ends a process; nothing of ours catches it."""


@contextmanager
def killed_at(asked: str) -> Iterator[None]:
    """A block whose process ends just before it asks MLflow for this."""
    from mlflow.tracking import MlflowClient

    def end(*arguments: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, asked, end)
        with pytest.raises(Killed):
            yield


@pytest.mark.parametrize("step", ["set_registered_model_tag", "set_registered_model_alias"])
def test_a_kill_at_any_step_leaves_a_history_that_rollback_can_follow(
    versions: list[registry.Version], step: str
) -> None:
    first, second, third = versions
    with killed_at(step):
        promote(first, right)
    assert holders() == []
    promote(first, right)
    promote(second, right)
    with killed_at(step):
        promote(third, right)
    assert holders() == [1, 2]
    assert previous_holder("promoted").number == 1
    with killed_at(step):
        promote(previous_holder("promoted"), right, how="rollback")
    assert holders() == [1, 2]
    promote(previous_holder("promoted"), right, how="rollback")
    assert holders() == [1, 2, 1]
    with pytest.raises(CameraError, match="nothing had the alias production before"):
        previous_holder("promoted")


def test_what_somebody_did_in_mlflow_by_hand_is_part_of_the_history(versions: list[registry.Version]) -> None:
    first, second, third = versions
    promote(first, right)
    connect().set_registered_model_alias("promoted", "production", str(third.number))
    assert history("promoted")[-1] == Holder(third.number, "", "by hand")
    promote(second, right)
    assert previous_holder("promoted").number == third.number
    connect().set_registered_model_tag("promoted", "camera.history.production", "[{}")
    assert holders() == [second.number]


def test_what_changes_while_it_is_audited_gets_no_alias(versions: list[registry.Version]) -> None:
    first = versions[0]

    def changing(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
        def audited(folder: Path) -> list[str]:
            change(folder)
            return []

        return audited

    def put_back(folder: Path) -> None:
        state = (folder / "results.json").stat()
        for text in ("another", RESULTS):
            (folder / "results.json").write_text(text)
        os.utime(folder / "results.json", ns=(state.st_atime_ns, state.st_mtime_ns))

    for change in (
        lambda folder: (folder / "added").touch(),
        lambda folder: (folder / "added").unlink(),
        put_back,
    ):
        with pytest.raises(CameraError, match="changed while it was looked at"):
            promote(first, changing(change), alias="held")
    registered = registry.find_version(first.label)
    registry.set_tags(registered, {"dvc.md5": "0.dir"})
    with pytest.raises(CameraError, match="changed in the registry meanwhile"):
        promote(first, right, alias="held")
    assert "held" not in registry.find_version(first.label).aliases


def test_nobody_of_ours_publishes_into_a_folder_that_is_judged(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    entered = threading.Event()

    def publish() -> None:
        with held(tmp_path / "tiny"):
            entered.set()

    with held(tmp_path / "tiny") as unchanged:
        other = threading.Thread(target=publish)
        other.start()
        assert not entered.wait(0.2)
        unchanged()
    other.join()
    assert entered.is_set()
