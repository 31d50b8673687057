"""A stage runs once for what it is asked, and again only when that changes or its result is gone."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from camera.digests import digest_json
from tasks.options import Sections
from tasks.stage import Context, Input, Request, RunReferences, find, perform
from tasks.store import Artifact, Store
from tests.tasks.conftest import WordOptions, flip, toy_options, toy_stage

SOURCE = Input(Path("text.txt"), "digest of the text", about={"path": "text.txt", "files": {}})


def write(context: Context) -> dict[str, float]:
    """Join the inputs and an option into one file."""
    texts = [path.read_text() for path in context.inputs.values() if path.is_file()]
    texts += [(path / "out").read_text() for path in context.inputs.values() if path.is_dir()]
    (context.out / "out").write_text(" ".join([*texts, context.options.of(WordOptions).word]))
    return {"length": len(texts)}


WRITE = toy_stage("write", write)


def request(**changes: Any) -> Request:
    asked = Request(
        "write a", WRITE, toy_options(word="a", layers=[1, 2]), {"text": SOURCE}, {"device": "cpu"}
    )
    return replace(asked, **changes)


def test_the_key_is_the_digest_of_stage_version_options_facts_and_input_digests() -> None:
    assert request().key == digest_json(
        {
            "stage": "write",
            "version": 1,
            "options": {"toy": {"word": "a", "layers": [1, 2]}},
            "facts": {"device": "cpu"},
            "inputs": {"text": "digest of the text"},
        }
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": replace(WRITE, name="other")},
        {"stage": replace(WRITE, version=2)},
        {"options": toy_options(word="b", layers=[1, 2])},
        {"options": toy_options(word="a", layers=[2, 1])},
        {"options": toy_options(word="a")},
        {"options": Sections(other=WordOptions(word="a", layers=(1, 2)))},
        {"facts": {"device": "npu"}},
        {"facts": {}},
        {"inputs": {"text": replace(SOURCE, digest="another")}},
        {"inputs": {"story": SOURCE}},
        {"inputs": {"text": SOURCE, "more": SOURCE}},
        {"inputs": {}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_decides_the_result_decides_the_key(changes: dict[str, Any]) -> None:
    assert request(**changes).key != request().key


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "write the same"},
        {"references": RunReferences("mlflow", "prefect")},
        {"options": toy_options(layers=[1, 2], word="a")},
        {"inputs": {"text": replace(SOURCE, path=Path("elsewhere/text.txt"))}},
        {"inputs": {"text": replace(SOURCE, about={})}},
        {"inputs": {"text": replace(SOURCE, stage="fetch", key="key")}},
        {"stage": replace(WRITE, run=lambda context: {})},
        {"stage": replace(WRITE, resumes=True)},
        {"stage": replace(WRITE, still_holds=lambda artifact: False)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_nothing_else_decides_the_key(changes: dict[str, Any]) -> None:
    assert request(**changes).key == request().key


def test_the_order_of_inputs_is_no_part_of_the_key() -> None:
    other = Input(Path("x"), "x")
    one, two = {"a": SOURCE, "b": other}, {"b": other, "a": SOURCE}
    assert request(inputs=one).key == request(inputs=two).key


class Chain:
    """Three stages in a row on a real text, and which of them ran."""

    def __init__(self, store: Store, text: Path, still_holds: Callable[[Artifact], bool]) -> None:
        self.store, self.text = store, text
        self.last = replace(WRITE, name="last", still_holds=still_holds)

    def run(self, word: str = "two") -> tuple[list[Artifact], list[str]]:
        ran: list[str] = []
        given = Input(self.text, "digest of the text", about={"path": str(self.text), "files": {}})
        artifacts: list[Artifact] = []
        for step, stage in [
            ("one", WRITE),
            (word, replace(WRITE, name="middle")),
            ("three", self.last),
        ]:
            asked = Request(step, stage, toy_options(word=step), {"text": given})
            artifacts.append(perform(self.store, asked, started=lambda step=step: ran.append(step)))
            given = Input.of(artifacts[-1])
        return artifacts, ran


@pytest.fixture
def effect(tmp_path: Path) -> Path:
    """Stands for something outside the store, like a published folder."""
    path = tmp_path / "effect"
    path.touch()
    return path


@pytest.fixture
def chain(store: Store, tmp_path: Path, effect: Path) -> Chain:
    text = tmp_path / "text.txt"
    text.write_text("zero")
    return Chain(store, text, lambda artifact: effect.exists())


def test_stages_pass_on_what_they_made(chain: Chain) -> None:
    artifacts, ran = chain.run()
    assert ran == ["one", "two", "three"]
    assert (artifacts[-1].path / "out").read_text() == "zero one two three"


def test_a_second_run_takes_everything_from_the_store(chain: Chain) -> None:
    first, _ = chain.run()
    second, ran = chain.run()
    assert ran == []
    assert second == first


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("damage", ["flipped bit", "removed"])
def test_a_damaged_artifact_alone_is_made_again(chain: Chain, which: int, damage: str) -> None:
    first, _ = chain.run()
    if damage == "removed":
        shutil.rmtree(first[which].path)
    else:
        flip(first[which].path / "out")
    second, ran = chain.run()
    assert ran == [["one", "two", "three"][which]]
    assert [artifact.digest for artifact in second] == [artifact.digest for artifact in first]
    assert [artifact.key for artifact in second] == [artifact.key for artifact in first]


def test_a_changed_option_runs_its_stage_and_what_then_changes(chain: Chain) -> None:
    chain.run()
    artifacts, ran = chain.run(word="zwei")
    assert ran == ["zwei", "three"]
    assert (artifacts[-1].path / "out").read_text() == "zero one zwei three"
    assert chain.run()[1] == []  # the earlier results are still there


def test_a_change_that_leads_to_the_same_bytes_ends_there(store: Store, chain: Chain) -> None:
    first, _ = chain.run()
    newer = replace(WRITE, name="middle", version=2)
    given = Input.of(first[0])
    made = perform(store, Request("two", newer, toy_options(word="two"), {"text": given}))
    assert made.key != first[1].key
    last = Request("three", chain.last, toy_options(word="three"), {"text": Input.of(made)})
    assert perform(store, last, started=lambda: pytest.fail("ran again")) == first[2]


def test_a_stage_whose_effect_is_gone_runs_again(chain: Chain, effect: Path) -> None:
    first, _ = chain.run()
    effect.unlink()
    second, ran = chain.run()
    assert ran == ["three"]
    assert second[-1].digest == first[-1].digest
    effect.touch()
    assert chain.run()[1] == []


def test_find_answers_what_perform_would_take(chain: Chain, effect: Path, store: Store) -> None:
    artifacts, _ = chain.run()
    last = Request("three", chain.last, toy_options(word="three"), {"text": Input.of(artifacts[1])})
    assert find(store, last) == artifacts[2]
    effect.unlink()
    assert find(store, last) is None


def test_the_manifest_says_what_was_asked(store: Store, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("zero")
    asked = request(inputs={"text": replace(SOURCE, path=text)}, references=RunReferences("run-1", "run-2"))
    manifest = perform(store, asked).manifest
    assert (manifest["stage"], manifest["version"], manifest["key"]) == ("write", 1, asked.key)
    assert manifest["options"] == asked.options.identity()
    assert manifest["inputs"] == {"text": {"digest": SOURCE.digest, "stage": None, "key": None}}
    assert manifest["step"] == "write a"
    assert manifest["metrics"] == {"length": 1}
    assert manifest["environment"]["packages"]["torch"]


def test_the_context_holds_what_the_stage_needs(store: Store, tmp_path: Path) -> None:
    seen: list[Context] = []

    def look(context: Context) -> dict[str, float]:
        seen.append(context)
        context.progress(1, 2)
        return {}

    told: list[tuple[int, int]] = []
    references = RunReferences("run-1", "run-2")
    asked = request(stage=toy_stage("look", look), references=references)
    perform(store, asked, progress=lambda done, total: told.append((done, total)))
    [context] = seen
    assert context.inputs == {"text": SOURCE.path}
    assert context.options == asked.options
    assert context.references == references
    assert SOURCE.digest in context.lineage["sources"]
    assert context.out.parent == store.root / "look"
    assert told == [(1, 2)]


def test_a_stage_that_fails_can_be_asked_again(store: Store) -> None:
    fails = [True]

    def once(context: Context) -> dict[str, float]:
        (context.out / "part").write_text("x")
        if fails:
            fails.pop()
            raise OSError("no space left")
        return {}

    asked = request(stage=toy_stage("once", once))
    with pytest.raises(OSError, match="no space left"):
        perform(store, asked)
    assert find(store, asked) is None
    assert perform(store, asked).manifest["files"].keys() == {"part"}


def test_facts_that_are_no_json_never_become_a_key() -> None:
    with pytest.raises(TypeError):
        _ = request(facts={"path": Path("x")}).key
    with pytest.raises(ValueError, match="JSON"):
        _ = request(facts={"ratio": float("nan")}).key
