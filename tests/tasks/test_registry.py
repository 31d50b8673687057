"""A registry that is shared with others: of many pages, with names that mean something in MLflow's search, with strange tags."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from camera.errors import CameraError
from tasks import mlflow_client, registry, runs
from tasks.mlflow_client import connect
from tests.tasks.test_signing import publication

NAMES = ["its-ours", "bob's model", '50% "of" back\\slash']


@pytest.fixture
def shared(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Models of ours by these names, and others' beside them; MLflow gives two at a time."""
    client = connect()
    run = client.create_run("0").info.run_id
    for number in range(3):
        client.create_registered_model(f"other's {number}")
        client.create_model_version(f"other's {number}", "file:///elsewhere", run)
    for number, name in enumerate(NAMES):
        lineage = publication(tmp_path / str(number), recipe={"of": name})
        for _ in range(2):  # the second finds the first
            registry.register(name, tmp_path / str(number), lineage, None, "candidate", run)
    monkeypatch.setattr(mlflow_client, "_PAGE", 2)
    yield NAMES
    for model in [*NAMES, *(f"other's {number}" for number in range(3))]:
        client.delete_registered_model(model)


def test_every_model_is_found_whatever_its_name_and_page(shared: list[str]) -> None:
    known = registry.versions()
    assert sorted(version.name for version in known if version.name in shared) == sorted(shared)
    assert not any(version.name.startswith("other's") for version in known)
    for name in shared:
        version = registry.find_version(name)
        assert (version.name, version.number, version.aliases) == (name, 1, ("candidate",))
        assert registry.find_version(f"{name}@candidate") == version
        assert [entry.name for entry in registry.versions_of(version.lineage_digest)] == [name]
    with pytest.raises(CameraError, match="the registry has no model bob"):
        registry.find_version("bob")


def test_a_tag_that_somebody_wrote_is_an_error_in_words(shared: list[str]) -> None:
    version = registry.find_version(shared[1])
    registry.set_tags(version, {"camera.lineage": "[NaN"})
    with pytest.raises(
        CameraError, match=r"bob's model@1: the tag camera\.lineage in MLflow's registry holds no lineage"
    ):
        _ = registry.find_version(shared[1]).lineage


def test_runs_are_found_by_names_that_mean_something_in_a_search(shared: list[str]) -> None:
    client = connect()
    for name in shared:
        client.create_run("0", tags={runs.KEY_TAG: name}, run_name=name)
    for name in shared:
        assert [run.name for run in runs.list_runs(limit=1, name=name)] == [name]
    assert len(runs.list_runs()) >= len(shared)
