"""What a person does with published models, from the command line: two are made, compared, promoted, and tidied up after."""

import json
from collections.abc import Callable

import pytest

from tests.flows.conftest import Workplace, flip_a_bit


@pytest.mark.slow
def test_published_models_are_listed_compared_promoted_rolled_back_and_outlive_a_gc(
    workplace: Workplace, states: Callable[[str], dict[str, str]]
) -> None:
    workplace.camera("run", "recipe.yaml", "--no-prefect", "--set", "name=first")
    again = ("run", "recipe.yaml", "--no-prefect", "--set", "prune.ratio=0.7", "--set", "name=second")
    workplace.camera(*again)

    runs = json.loads(workplace.camera("runs", "--json").stdout)
    assert [(run["name"], run["status"], run["published"]["version"]) for run in runs] == [
        ("second", "FINISHED", 1),
        ("first", "FINISHED", 1),
    ]
    assert runs[0]["perplexity"]["held-out"] > 0
    shown = workplace.camera("show", "second").stdout
    assert runs[0]["run_id"] in shown
    assert "candidate" in shown

    changed = json.loads(workplace.camera("diff", "first", "second", "--json").stdout)
    assert {"section": "recipe", "what": "prune.ratio", "before": 0.4, "after": 0.7} in changed["changes"]
    assert [layer["after"] for layer in changed["overlap"]] == [64, 64]

    weights = workplace.folder / "published" / "second" / "model-00001-of-00002.safetensors"
    flip_a_bit(weights)
    refused = workplace.camera("promote", "second", check=False)
    assert refused.returncode == 2
    assert f"{weights.name} does not have the sha256" in refused.stderr
    assert workplace.camera("audit", "--all", check=False).returncode == 1
    flip_a_bit(weights)
    workplace.camera("promote", "second")
    assert "production" in workplace.camera("show", "second").stdout
    assert "nothing had the alias" in workplace.camera("rollback", "second", check=False).stderr

    everything = ("gc", "--older-than", "0m", "--intermediates", "--json")
    planned = json.loads(workplace.camera(*everything, "--dry-run").stdout)
    done = json.loads(workplace.camera(*everything).stdout)
    assert [gone["name"] for gone in planned["removed"]] == [gone["name"] for gone in done["removed"]]
    assert done["size_after"] < done["size_before"] / 2
    output = workplace.camera(*again).stdout
    assert "done" not in states(output).values()
    assert "evicted  save" in output
    audited = workplace.camera("audit", "second", "--strict", "--json", check=False)
    assert audited.returncode == 3
    assert json.loads(audited.stdout)["unverifiable"]["evicted"] == 10
    rebuilt = workplace.camera("audit", "second", "--rebuild", check=False)
    assert rebuilt.stdout.count("bit for bit") == 1
    assert rebuilt.returncode == 3, "what was evicted is still not here"


def test_what_cannot_be_asked_together_is_said(workplace: Workplace) -> None:
    for arguments in (("audit",), ("audit", "x", "--all"), ("audit", "x", "--require-signature")):
        refused = workplace.camera(*arguments, check=False)
        assert refused.returncode == 2
        assert refused.stderr.startswith("camera: ")
    assert "no time" in workplace.camera("gc", "--older-than", "soon", check=False).stderr
    assert workplace.camera("runs").stdout.startswith("no runs yet")
