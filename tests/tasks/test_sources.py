"""Sources are identified by their bytes, wherever they lie."""

import shutil
from pathlib import Path

import pytest

from camera.errors import CameraError, NetworkError
from camera.files import read_json, write_json
from camera.options import CalibrationOptions
from tasks.options import Sections
from tasks.recipe import check_recipe
from tasks.sources import find_sources
from tasks.stage import Input, Request, perform
from tasks.stages import fetch
from tasks.store import Store
from tests.tasks.conftest import MakeRecipe, flip
from tests.tiny import TOKENS

WEIGHTS = "model.safetensors"


def test_a_changed_weight_changes_the_model_and_not_the_tokenizer(model: Path, recipe: MakeRecipe) -> None:
    before = find_sources(recipe())
    flip(model / WEIGHTS)
    after = find_sources(recipe())
    assert after.model.digest != before.model.digest
    assert after.tokenizer.digest == before.tokenizer.digest
    assert after.files[str(recipe().calibration.path)].digest == next(iter(before.files.values())).digest


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.model"])
def test_a_changed_side_file_changes_the_model(model: Path, recipe: MakeRecipe, file: str) -> None:
    before = find_sources(recipe())
    path = model / file
    path.write_bytes(path.read_bytes() + b"\n")
    after = find_sources(recipe())
    assert after.model.digest != before.model.digest
    assert (after.tokenizer.digest != before.tokenizer.digest) == (file == "tokenizer.model")


@pytest.mark.parametrize("file", ["README.md", "LICENSE", "logo.png"])
def test_documentation_is_no_part_of_the_model_but_of_its_folder(
    model: Path, recipe: MakeRecipe, file: str
) -> None:
    before = find_sources(recipe())
    assert before.folder.digest == before.model.digest
    (model / file).write_text("about this model")
    after = find_sources(recipe())
    assert after.model.digest == before.model.digest
    assert after.folder.digest != before.folder.digest
    assert file in after.folder.about["files"]
    assert file not in after.model.about["files"]


def test_a_model_that_moved_is_the_same_model(model: Path, recipe: MakeRecipe) -> None:
    before = find_sources(recipe())
    moved = model.parent / "elsewhere" / "other name"
    moved.parent.mkdir()
    model.rename(moved)
    after = find_sources(recipe(model=str(moved)))
    assert after.model.digest == before.model.digest
    assert after.tokenizer.digest == before.tokenizer.digest
    assert after.model.about["path"] == str(moved)


def test_a_dataset_folder_that_moved_is_the_same_dataset(tmp_path: Path, recipe: MakeRecipe) -> None:
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "deep" / "x.txt").write_text("words")
    before = find_sources(recipe(calibration={"path": str(tmp_path / "a")})).files[str(tmp_path / "a")]
    (tmp_path / "a").rename(tmp_path / "b")
    after = find_sources(recipe(calibration={"path": str(tmp_path / "b")})).files[str(tmp_path / "b")]
    assert after.digest == before.digest
    (tmp_path / "b" / "deep" / "x.txt").write_text("wordz")
    assert (
        find_sources(recipe(calibration={"path": str(tmp_path / "b")})).files[str(tmp_path / "b")].digest
        != before.digest
    )


def test_every_file_that_makes_the_model_is_recorded(model: Path, recipe: MakeRecipe) -> None:
    about = find_sources(recipe()).model.about
    assert {"config.json", WEIGHTS, "tokenizer.model", "tokenizer_config.json"} <= set(about["files"])
    assert "dvc" not in about


def test_a_file_that_is_no_part_of_a_model_does_not_change_it(model: Path, recipe: MakeRecipe) -> None:
    before = find_sources(recipe()).model.digest
    (model / ".cache").write_text("x")
    (model / "pytorch_model.bin").write_bytes(b"never loaded")
    assert find_sources(recipe()).model.digest == before


def test_a_missing_dataset_is_named(recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(CameraError, match=r"dataset .*gone\.txt does not exist"):
        find_sources(recipe(calibration={"path": str(tmp_path / "gone.txt")}))
    with pytest.raises(CameraError, match=r"dataset .*gone\.txt does not exist"):
        find_sources(recipe(evaluate={"datasets": [{"name": "file", "path": str(tmp_path / "gone.txt")}]}))


def test_a_missing_model_is_named(recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(CameraError, match="gone is not a folder here"):
        find_sources(recipe(model=str(tmp_path / "gone")))


def test_a_hub_model_that_is_not_cached_is_a_network_error_offline(recipe: MakeRecipe) -> None:
    with pytest.raises(NetworkError, match="some-org/some-model is no folder here"):
        find_sources(recipe(model="some-org/some-model"))


def test_weights_that_do_not_fit_the_config_are_refused_before_anything_runs(
    model: Path, recipe: MakeRecipe
) -> None:
    config = read_json(model / "config.json")
    write_json(model / "config.json", {**config, "intermediate_size": 128})
    with pytest.raises(CameraError, match="has shape"):
        find_sources(recipe())


def test_a_model_without_a_tokenizer_is_refused(model: Path, recipe: MakeRecipe) -> None:
    (model / "tokenizer.model").unlink()
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(CameraError, match="no tokenizer files"):
        find_sources(recipe())


def test_a_tokenizer_bigger_than_the_embedding_is_refused_when_text_is_fetched(
    tmp_path: Path, text: Path, store: Store
) -> None:
    from tests.tiny import tiny_checkpoint

    folder = tiny_checkpoint(tmp_path / "llama", "llama", layers=1)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "vocab_size": TOKENS - 1})
    options = Sections(calibration=CalibrationOptions(name="file", path=text, samples=1, length=16))
    inputs = {"tokenizer": Input(folder, "digest"), "file": Input(text, "digest of the text")}
    with pytest.raises(CameraError, match=rf"{TOKENS} tokens and the embedding {TOKENS - 1} rows"):
        perform(store, Request("fetch calibration", fetch.STAGE, options, inputs))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC repository without git, with a folder as its remote, and the working directory."""
    from dvc.repo import Repo

    root = tmp_path / "repository"
    root.mkdir()
    with Repo.init(str(root), no_scm=True) as repo, repo.config.edit("repo") as config:
        config["remote"]["box"] = {"url": str(tmp_path / "remote")}
        config["core"] = {**config.get("core", {}), "remote": "box", "analytics": False}
    monkeypatch.chdir(root)
    return root


def track(path: Path) -> None:
    """Add to DVC, push, and forget the local bytes."""
    from dvc.repo import Repo

    with Repo() as repo:
        repo.add([str(path)])
        repo.push()
    shutil.rmtree(path)
    shutil.rmtree(Path(".dvc") / "cache")


def test_what_dvc_tracks_and_is_not_here_is_pulled(repository: Path, model: Path, text: Path) -> None:
    shutil.copytree(model, "data/model")
    Path("data/text").mkdir()
    shutil.copy(text, "data/text/story.txt")
    plain = {
        "name": "tiny",
        "model": "data/model",
        "calibration": {"name": "file", "path": "data/text/story.txt"},
    }
    before = find_sources(check_recipe(plain, "test"))
    track(Path("data"))
    assert not Path("data").exists()
    after = find_sources(check_recipe(plain, "test"))
    assert Path("data/text/story.txt").read_bytes() == text.read_bytes()
    assert after.model.digest == before.model.digest
    assert after.files["data/text/story.txt"].digest == before.files["data/text/story.txt"].digest
    md5 = after.model.about["dvc"]["md5"]
    assert after.model.about["dvc"]["file"] == "data.dvc"
    assert md5.endswith(".dir")
    assert "dvc" not in before.model.about


def test_what_dvc_tracks_and_the_remote_lost_is_a_network_error(repository: Path, model: Path) -> None:
    shutil.copytree(model, "data")
    track(Path("data"))
    shutil.rmtree(repository.parent / "remote")
    with pytest.raises(NetworkError, match=r"data is tracked by data\.dvc and could not be pulled"):
        find_sources(check_recipe({"name": "tiny", "model": "data"}, "test"))
