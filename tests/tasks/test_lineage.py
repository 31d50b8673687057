"""Lineage says what an artifact descends from, the same way every time."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from camera.digests import canonical_json
from tasks.lineage import SCHEMA, _below_torch_npu, ancestry, environment, stage_entry
from tasks.stage import Context, Input, Request, RunReferences, perform
from tasks.store import Artifact, Store
from tests.tasks.conftest import WordOptions, toy_options, toy_stage

MODEL = Input(Path("m"), "digest-m", about={"path": "m", "files": {"w": "1"}})
TEXT = Input(Path("t"), "digest-t", about={"path": "t", "files": {"x": "2"}})


def name_it(context: Context) -> dict[str, float]:
    (context.out / "name").write_text(context.options.of(WordOptions).word)
    return {"measured": 1.0}


def make(store: Store, word: str, inputs: dict[str, Input], **changes: Any) -> Artifact:
    asked = Request(f"step {word}", toy_stage("name", name_it), toy_options(word=word), inputs)
    return perform(store, replace(asked, **changes))


@pytest.fixture
def diamond(store: Store) -> list[Artifact]:
    """a reads the text, b and c read a and the model, d reads b and c."""
    a = make(store, "a", {"text": TEXT})
    b = make(store, "b", {"model": MODEL, "given": Input.of(a)})
    c = make(store, "c", {"model": MODEL, "given": Input.of(a)})
    d = make(store, "d", {"left": Input.of(b), "right": Input.of(c)})
    return [a, b, c, d]


def test_a_source_is_kept_with_what_is_known_of_it() -> None:
    assert ancestry({"model": MODEL}) == {
        "schema": SCHEMA,
        "sources": {"digest-m": {"name": "model", "digest": "digest-m", "path": "m", "files": {"w": "1"}}},
        "stages": {},
    }


def test_ancestors_of_all_inputs_are_merged(diamond: list[Artifact]) -> None:
    a, b, c, d = diamond
    lineage = d.read_lineage()
    assert set(lineage["stages"]) == {a.key, b.key, c.key}
    assert set(lineage["sources"]) == {"digest-m", "digest-t"}
    entry = lineage["stages"][b.key]
    assert (entry["step"], entry["stage"], entry["digest"]) == ("step b", "name", b.digest)
    assert entry["options"] == {"toy": {"word": "b", "layers": []}}
    assert entry["inputs"]["given"] == {"digest": a.digest, "stage": "name", "key": a.key}
    assert entry["inputs"]["model"] == {"digest": "digest-m", "stage": None, "key": None}


def test_an_artifact_names_itself_without_its_own_digest(diamond: list[Artifact]) -> None:
    own = diamond[3].read_lineage()["artifact"]
    assert (own["key"], own["step"]) == (diamond[3].key, "step d")
    assert "digest" not in own


def test_every_input_of_every_stage_is_in_the_document(diamond: list[Artifact]) -> None:
    lineage = ancestry({"d": Input.of(diamond[3])})
    assert diamond[3].key in lineage["stages"]
    for entry in lineage["stages"].values():
        for given in entry["inputs"].values():
            known = lineage["sources"] if given["key"] is None else lineage["stages"]
            assert given["key"] in known or given["digest"] in known


def test_the_order_of_inputs_does_not_matter(diamond: list[Artifact]) -> None:
    inputs = {"left": Input.of(diamond[1]), "right": Input.of(diamond[2]), "model": MODEL}
    turned = dict(reversed(inputs.items()))
    assert json.dumps(ancestry(inputs)) == json.dumps(ancestry(turned))


def test_it_holds_no_time_and_no_run(tmp_path: Path) -> None:
    documents = []
    for run in ("first", "second"):
        store, references = Store(tmp_path / run), RunReferences(f"mlflow {run}", f"prefect {run}")
        a = make(store, "a", {"text": TEXT}, references=references)
        documents.append(
            make(store, "b", {"given": Input.of(a)}, references=references).path / "lineage.json"
        )
    assert documents[0].read_bytes() == documents[1].read_bytes()
    text = documents[0].read_text()
    for word in ("mlflow first", "prefect first", "seconds", "created", "measured", str(tmp_path)):
        assert word not in text


def test_it_is_plain_json(diamond: list[Artifact]) -> None:
    lineage = ancestry({"d": Input.of(diamond[3])})
    assert json.loads(canonical_json(lineage)) == lineage


def test_an_entry_leaves_out_what_was_measured(diamond: list[Artifact]) -> None:
    entry = stage_entry(diamond[0].manifest)
    assert set(entry) == {
        "step",
        "stage",
        "version",
        "key",
        "digest",
        "options",
        "facts",
        "inputs",
        "environment",
    }


def test_the_environment_names_code_packages_and_device() -> None:
    found = environment("cpu")
    assert found["device"] == "cpu"
    assert set(found) == {"camera", "commit", "python", "machine", "packages", "device"}
    assert {"torch", "transformers", "safetensors", "numpy"} <= set(found["packages"])
    assert "device" not in environment(None)
    assert environment("cpu") == found
    assert "cann" not in found["packages"]


def test_the_environment_of_an_npu_names_what_lies_below_torch_npu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cann = tmp_path / "aarch64-linux"
    cann.mkdir()
    (cann / "ascend_toolkit_install.info").write_text("package_name=toolkit\nversion=9.1.0\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    _below_torch_npu.cache_clear()
    try:
        assert environment("npu")["packages"]["cann"] == "9.1.0"
    finally:
        _below_torch_npu.cache_clear()
