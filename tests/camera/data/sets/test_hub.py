"""Hub datasets, read by the `datasets` library itself from local folders in the hub's layout."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from camera.data.sets import hub
from camera.errors import CameraError, NetworkError
from camera.options import DatasetOptions


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def wikitext2(tmp_path: Path) -> hub.HubDataset:
    """A folder laid out as the repository is, with other lines in it."""
    folder = tmp_path / "wikitext"
    config = "wikitext-2-raw-v1"
    (folder / config).mkdir(parents=True)
    parts = "".join(f"  - split: {part}\n    path: {config}/{part}-*\n" for part in ("test", "train"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{parts}---\n")
    for part in ("test", "train"):
        lines = ["", f" = {part} = \n", "", " A line . \n"]
        pq.write_table(pa.table({"text": lines}), folder / config / f"{part}-00000-of-00001.parquet")
    return replace(hub.WIKITEXT2, repository=str(folder))


@pytest.fixture
def c4(tmp_path: Path) -> hub.HubDataset:
    (tmp_path / "c4" / "en").mkdir(parents=True)
    for part, name in hub.C4.files.items():
        rows = [{"text": f"{part} {number}", "url": "u"} for number in range(1200)]
        with gzip.open(tmp_path / "c4" / name, "wt", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    return replace(hub.C4, repository=str(tmp_path / "c4"))


def test_wikitext_is_its_lines_joined_by_blank_lines(wikitext2: hub.HubDataset) -> None:
    documents = wikitext2.read(DatasetOptions(split="test"))
    assert documents.joined == "\n\n = test = \n\n\n\n\n A line . \n"
    assert documents.strategy == "joined"
    assert wikitext2.read(DatasetOptions(split="train")).texts[1] == " = train = \n"


def test_c4_is_read_document_by_document(c4: hub.HubDataset) -> None:
    train, test = c4.read(DatasetOptions(split="train")), c4.read(DatasetOptions(split="test"))
    assert train.strategy == "documents"
    assert len(train.texts) == len(test.texts) == 1200
    assert (train.texts[1199], test.texts[1199]) == ("train 1199", "validation 1199")


def test_the_source_names_repository_part_and_revision(wikitext2: hub.HubDataset) -> None:
    assert hub.WIKITEXT2.revision in wikitext2.read(DatasetOptions(split="test")).source
    assert "test part, revision abc" in wikitext2.read(DatasetOptions(split="test", revision="abc")).source


@pytest.mark.parametrize("dataset", [hub.WIKITEXT2, hub.C4], ids=("wikitext2", "c4"))
def test_without_a_network_the_message_says_what_to_do(dataset: hub.HubDataset) -> None:
    with pytest.raises(NetworkError, match=r"HF_HOME.*`path` of a local copy beside its name"):
        dataset.read(DatasetOptions(split="train"))


def test_a_missing_part_is_no_network_error(c4: hub.HubDataset) -> None:
    with pytest.raises(CameraError) as raised:
        replace(c4, files={"train": "en/absent.json.gz"}).read(DatasetOptions())
    assert not isinstance(raised.value, NetworkError)


@pytest.mark.parametrize("dataset", [hub.WIKITEXT2, hub.C4], ids=("wikitext2", "c4"))
def test_revisions_are_full_commits(dataset: hub.HubDataset) -> None:
    assert len(dataset.revision) == 40
    assert int(dataset.revision, 16)
