"""An engine is found by its name, with options of its own in the section `benchmark`."""

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import ValidationError

from camera.engines import ENGINES
from camera.engines.llama_cpp import LlamaCppEngine, LlamaCppOptions
from camera.options import BenchmarkOptions, Options, Setting


def test_the_engines_that_there_are() -> None:
    assert list(ENGINES) == ["llama.cpp", "torch"]


def test_an_unknown_engine_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValidationError, match=r"unknown engine 'vllm': known are llama\.cpp, torch"):
        BenchmarkOptions(engines=("vllm",))


def test_an_engines_own_options_are_fields_of_the_section() -> None:
    options = BenchmarkOptions.model_validate(
        {"engines": ["llama.cpp"], "llama_cpp": "build", "timeout": "9"}
    )
    assert options.of(LlamaCppOptions) == LlamaCppOptions(llama_cpp=Path("build"), timeout=9)
    assert options.execution() == {
        "device": "auto",
        "llama_cpp": "build",
        "llama_cpp_stock": None,
        "timeout": 9,
    }
    assert not {"llama_cpp", "llama_cpp_stock", "timeout", "device"} & options.identity().keys()
    assert BenchmarkOptions.model_validate(options.model_dump(mode="json")) == options


@pytest.mark.parametrize(("field", "value"), [("timout", 3), ("timeout", 0), ("llama_cpp", 3)])
def test_a_wrong_field_is_refused_by_its_name(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as refused:
        BenchmarkOptions.model_validate({field: value})
    assert [error["loc"] for error in refused.value.errors()] == [(field,)]


def test_one_more_engine_brings_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    class FastOptions(Options):
        batches: int = 1
        log: Annotated[str, Setting] = ""

    class FastEngine(LlamaCppEngine):
        options = FastOptions

    list(ENGINES)  # found before one is added for a while
    monkeypatch.setitem(ENGINES._entries, "fast", FastEngine)
    options = BenchmarkOptions.model_validate({"engines": ["fast"], "batches": 2, "log": "a"})
    assert options.identity()["batches"] == 2
    assert options.execution() == {"device": "auto", "log": "a"}
    other = BenchmarkOptions.model_validate({"engines": ["torch"], "batches": 2})
    assert other.identity() == BenchmarkOptions(engines=("torch",)).identity()  # it is not timed
