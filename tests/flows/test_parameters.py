"""What the deployments' parameters let through."""

import importlib
import json
import re

import pytest
from pydantic import TypeAdapter, ValidationError

from flows.parameters import Override, override_pattern

OVERRIDE = TypeAdapter(Override)


@pytest.mark.parametrize(
    "given",
    [
        "prune.ratio=0.3",
        "prune={ratio: 0.3}",
        "benchmark.decode=[8, 16]",
        "quantize.overrides.*.down_proj.weight=q8_0",
        "quantize.twin=",
        "name=a=b",
    ],
)
def test_what_set_takes_is_let_through(given: str):
    assert OVERRIDE.validate_python(given) == given


@pytest.mark.parametrize(
    "given", ["prune.ratoi=0.3", "prune.ratio", "ratio=0.3", "", "x.prune.ratio=1", "prune-ratio=1"]
)
def test_a_field_that_no_recipe_has_is_refused(given: str):
    with pytest.raises(ValidationError):
        OVERRIDE.validate_python(given)


def test_the_schema_that_the_server_checks_refuses_the_same():
    pattern = OVERRIDE.json_schema()["pattern"]
    assert json.loads(json.dumps(pattern)) == override_pattern()
    assert re.search(pattern, "prune.ratio=0.3")
    assert not re.search(pattern, "prune_ratio=0.3"), "a dot in a field's path stands for itself"


def test_fields_of_an_optional_section_can_be_overridden() -> None:
    pattern = re.compile(override_pattern())
    for override in (
        "publish.require.task_drop=2",
        "publish.require.perplexity_increase.c4-test=0.3",
        "sweep=null",
    ):
        assert pattern.match(override), override
    assert not pattern.match("publish.require.nothing=1")


@pytest.mark.parametrize("module", ["compress", "sweep", "nightly"])
def test_every_deployment_that_takes_recipes_has_their_patterns_in_its_schema(module: str) -> None:
    flow = getattr(importlib.import_module(f"flows.{module}"), module)
    schema = flow.parameters.properties
    overrides = next(choice for choice in schema["overrides"]["anyOf"] if choice.get("type") == "array")
    assert overrides["items"]["pattern"] == override_pattern()
    recipe = schema["recipes"]["items"] if module == "nightly" else schema["recipe"]
    named = (
        recipe if module == "nightly" else next(choice for choice in recipe["anyOf"] if "pattern" in choice)
    )
    assert named["type"] == "string"


def test_what_a_sweep_varies_can_be_overridden() -> None:
    for override in ("sweep.ratios=[0.1, 0.3]", "sweep.grid.prune.multiple_of=[64]", "sweep.workers=2"):
        assert OVERRIDE.validate_python(override) == override
    for wrong in ("sweep.ratio=[0.1]", "sweep.ratios.0=0.1", "ratios=[0.1]"):
        with pytest.raises(ValidationError):
            OVERRIDE.validate_python(wrong)
