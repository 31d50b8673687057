"""A source that changes while a stage reads it, put back or not, gives no artifact under the old name."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from camera.digests import digest_json
from camera.errors import CameraError
from camera.held import SourceChangedError, hold, opened
from tasks.pipeline import build_pipeline
from tasks.plan import execute
from tasks.recipe import Recipe
from tasks.sources import find_sources
from tasks.stage import Context, Input, Request, Stage, perform
from tasks.store import Artifact, Store
from tests.adversary import DECEITS, while_swapped
from tests.tasks.conftest import MakeRecipe, toy_options, toy_stage

Run = Callable[[Context], dict[str, float]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "above" / "source"
    folder.mkdir(parents=True)
    (folder / "text").write_text("1 word")
    return folder


def copying(context: Context) -> dict[str, float]:
    """Copy the source, in two parts of which the first is made once."""
    folder = context.inputs["source"]
    if not (context.out / "first").exists():
        (context.out / "first").write_bytes(opened(folder / "text").read())
    (context.out / "second").write_bytes(opened(folder / "text").read())
    return {}


def request(source: Path, run: Run = copying) -> Request:
    held = hold(source, ["text"], "here")
    given = Input(source, digest_json(held.digests), held=held)
    return Request("copy", replace(toy_stage("copy", run), resumes=True), toy_options(), {"source": given})


def left(store: Store) -> list[str]:
    """Names of all files in the folders of stages."""
    return [path.name for path in store.root.glob("copy/**/*") if path.is_file() and path.suffix != ".json"]


@pytest.mark.parametrize("deceit", DECEITS)
def test_nothing_of_a_source_that_was_another_meanwhile_is_kept(
    source: Path, store: Store, deceit: str
) -> None:
    def deceived(context: Context) -> dict[str, float]:
        with while_swapped(deceit, source, "text"):
            return copying(context)

    with pytest.raises(SourceChangedError, match="run again"):
        perform(store, request(source, deceived))
    assert left(store) == []
    made = perform(store, request(source)).path
    assert {(made / name).read_text() for name in ("first", "second")} == {"1 word"}


@pytest.mark.parametrize("deceit", [each for each in DECEITS if each != "folder above"])
def test_a_change_that_comes_after_the_last_byte_was_read_is_seen_too(
    source: Path, store: Store, deceit: str
) -> None:
    def deceived(context: Context) -> dict[str, float]:
        found = copying(context)
        DECEITS[deceit](source, "text").swap()
        return found

    with pytest.raises(SourceChangedError):
        perform(store, request(source, deceived))
    assert left(store) == []


def killed(context: Context) -> dict[str, float]:
    copying(context)
    raise KeyboardInterrupt


@pytest.mark.parametrize("deceit", [each for each in DECEITS if each != "folder above"])
def test_what_a_killed_stage_made_of_another_source_is_not_gone_on_with(
    source: Path, store: Store, deceit: str
) -> None:
    def killed_among_others(context: Context) -> dict[str, float]:
        (context.out / "first").write_text("0 word")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform(store, request(source, killed_among_others))
    with while_swapped(deceit, source, "text"):
        pass
    made = perform(store, request(source)).path
    assert (made / "first").read_text() == "1 word"


def test_what_a_killed_stage_made_of_the_same_source_is_gone_on_with(source: Path, store: Store) -> None:
    with pytest.raises(KeyboardInterrupt):
        perform(store, request(source, killed))
    assert set(left(store)) == {"first", "second"}
    working = store.working("copy", request(source).key)
    (working / "first").write_text("as it was left")  # a stage holds its own parts to their digests
    made = perform(store, request(source)).path
    assert (made / "first").read_text() == "as it was left"
    assert not list(store.root.glob("copy/.*"))


@pytest.mark.slow
@pytest.mark.parametrize("deceit", DECEITS)
def test_every_stage_of_a_run_notices(model: Path, tmp_path: Path, recipe: MakeRecipe, deceit: str) -> None:
    above = tmp_path / "above"
    folder = Path(shutil.copytree(model, above / "model"))
    text = Path(shutil.copyfile(tmp_path / "story.txt", above / "story.txt"))
    asked = recipe(
        model=str(folder),
        calibration={"path": str(text)},
        evaluate={"datasets": [{"name": "file", "path": str(text)}], "samples": 2},
        publish={"enabled": False},
    )
    pipeline, store = build_pipeline(asked, find_sources(asked)), Store(tmp_path / "store")
    honest = execute(pipeline, lambda step, request: perform(store, request), store)
    noticed = []
    for step in pipeline.steps:
        made = honest[step.name]
        if all(isinstance(given, str) for given in step.inputs.values()):
            continue
        names = [(text.parent, text.name)] if "file" in step.inputs else []
        for where, name in [*names, (folder, "model.safetensors"), (folder, "tokenizer.model")]:
            remove(made)
            again = requested(asked, step.name, honest)
            try:
                found = perform(store, replace(again, stage=deceived(again.stage, deceit, where, name)))
                assert found.digest == made.digest or step.stage.name == "benchmark"
                no_part = step.stage.name == "fetch" and name == "model.safetensors"
                assert deceit == "folder above" or no_part, f"{step.name}, {name}"
            except SourceChangedError:
                noticed.append(step.stage.name)
                assert store.find(step.stage.name, again.key) is None
                assert not any(store.working(step.stage.name, again.key).iterdir())
            perform(store, requested(asked, step.name, honest))
    # A folder above that was exchanged is only noticed by who reads of it.
    assert {"fetch", "capture", "score", "save", "quantize", "evaluate", "benchmark"} <= set(noticed)


def requested(asked: Recipe, name: str, honest: dict[str, Artifact]) -> Request:
    """A step of a run that begins now: its sources are hashed again."""
    steps = build_pipeline(asked, find_sources(asked)).steps
    return next(step for step in steps if step.name == name).request(honest)


def deceived(stage: Stage, deceit: str, folder: Path, name: str) -> Stage:
    def run(context: Context) -> dict[str, float]:
        with while_swapped(deceit, folder, name):
            return stage.run(context)

    return replace(stage, run=run)


def remove(artifact: Artifact) -> None:
    shutil.rmtree(artifact.path)


def test_what_is_planned_is_of_the_files_that_were_hashed(
    model: Path, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.json is another while the folder is first opened, and put back before it is hashed."""
    from tasks import sources

    config, whole = model / "config.json", (model / "config.json").read_text()
    config.write_text(whole.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 0.5'))

    def put_back_and_hash(*arguments: object) -> object:
        config.write_text(whole)
        return hold(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sources, "hold", put_back_and_hash)
    assert find_sources(recipe()).checkpoint.config["rms_norm_eps"] != 0.5


def test_a_source_that_changes_between_two_steps_ends_the_run(model: Path, recipe: MakeRecipe) -> None:
    found = find_sources(recipe())
    assert found.model.held is not None
    (model / "model.safetensors").touch()
    with pytest.raises(CameraError, match=r"model\.safetensors was changed or replaced"):
        found.model.held.check()


def test_only_what_decides_is_held(model: Path, recipe: MakeRecipe) -> None:
    (model / "README.md").write_text("a card")
    found = find_sources(recipe())

    def changed(name: str) -> set[str]:
        (model / name).touch()
        seen = set()
        for given in ("model", "folder", "tokenizer"):
            held = getattr(found, given).held
            try:
                held.check()
            except SourceChangedError:
                seen.add(given)
        return seen

    assert changed("README.md") == {"folder"}
    assert changed("model.safetensors") == {"folder", "model"}
    assert changed("tokenizer.model") == {"folder", "model", "tokenizer"}


def test_where_times_cannot_be_relied_on_nothing_is_hashed_twice_before_the_first_step(
    model: Path, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from camera import held, identity

    hashed, real = list[str](), held.digest_open
    monkeypatch.setattr(identity, "_mounts", lambda: {"/": "nfs4"})
    monkeypatch.setattr(
        held, "digest_open", lambda file, size: (hashed.append(file.name), real(file, size))[1]
    )
    found = find_sources(recipe())
    assert found.tokens
    assert found.gguf_concerns == []
    assert len(hashed) == len(set(hashed))
