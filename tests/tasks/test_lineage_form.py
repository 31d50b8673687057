"""The form of lineage.json is published as a JSON Schema, and the audit holds documents to it."""

import json
from typing import Any

import pytest

from camera.digests import digest_json
from camera.errors import CameraError
from tasks.lineage_form import check_lineage, json_schema

DIGEST = "0" * 64
ENVIRONMENT = {
    "camera": "1",
    "commit": None,
    "python": "3.11",
    "machine": "x86_64",
    "packages": {"torch": "2"},
}


def document(**changes: Any) -> dict[str, Any]:
    source = {"name": "model", "digest": DIGEST, "path": "m", "files": {"w": DIGEST}}
    stage = {
        "step": "save",
        "stage": "save",
        "version": 1,
        "key": DIGEST,
        "digest": DIGEST,
        "options": {},
        "inputs": {"model": {"digest": DIGEST, "stage": None, "key": None}},
        "environment": ENVIRONMENT,
    }
    body = {
        "schema": 1,
        "sources": {DIGEST: source},
        "stages": {DIGEST: stage},
        "name": "tiny",
        "recipe": {},
        "files": {"config.json": DIGEST},
        "environment": ENVIRONMENT,
        "references": {},
        **changes,
    }
    return {**body, "digest": digest_json(body)}


WRONG: dict[str, dict[str, Any]] = {
    "a field that nobody knows": {"remark": "x"},
    "a digest that is none": {"files": {"config.json": "abc"}},
    "no recipe": {"recipe": None},
    "an environment without python": {"environment": {"camera": "1"}},
}


def test_a_document_of_the_form_passes_schema_and_audit() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(document(), json.loads(json_schema()))
    assert check_lineage(document(), "here") == document()


@pytest.mark.parametrize("wrong", WRONG)
def test_what_the_schema_refuses_the_audit_refuses_and_names_the_field(wrong: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    bad = document(**WRONG[wrong])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad, json.loads(json_schema()))
    with pytest.raises(CameraError, match=f"here is no lineage of this pipeline: {next(iter(WRONG[wrong]))}"):
        check_lineage(bad, "here")


def test_a_newer_form_asks_for_a_newer_version() -> None:
    with pytest.raises(CameraError, match="is of schema 4, and this version reads up to 3"):
        check_lineage(document(schema=4), "here")
