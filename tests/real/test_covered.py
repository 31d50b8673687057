"""What of the command line the suite at real shapes runs; part of the quick suite."""

import inspect
from typing import Any, Literal, get_args, get_origin

import pytest
from typer.models import OptionInfo

from camera.cli import PIPELINE_COMMANDS
from camera.cli.options import stage_command
from camera.cli.stages import STAGES
from tests.real.commands import COMMANDS

WITHOUT_WEIGHTS = {
    "--help": "shows text",
    "--json": "prints the result in another form",
    "--device": "names the machine's accelerator; the suite runs on the CPU",
    "--seed": "chooses other tokens",
    "--field": "says where a data set's file holds its text",
    "--revision": "names a data set on the hub",
    "--name": "is a string in the GGUF file",
    "--experts": "is of mixtures of experts; the model is dense",
    "--scope": "is of mixtures of experts; the model is dense",
    "--samples": "writes text for people, by a model that is in memory whole",
    "--task-dtype": "is --dtype, for tasks",
    "--preset": "gives other flags their values",
    "--timeout": "ends a llama-bench that hangs",
    "--llama-cpp": "names a llama-bench of the user's",
    "--llama-cpp-stock": "names another one",
}
"""Options that change nothing in how weights are read, computed or written, and what they do."""
PIPELINE_WITHOUT_WEIGHTS = {
    "sweep": "runs what `run` runs, several times",
    "serve": "starts servers",
    "automations": "talks to a server",
    "runs": "reads MLflow",
    "show": "reads MLflow and records",
    "sign": "signs a record",
    "promote": "audits, and `audit` is run",
    "rollback": "audits, and `audit` is run",
    "diff": "compares records and kept channels",
    "gc": "removes folders",
}
STAGE_COMMANDS = {stage.name: stage for stage in STAGES}


def options(name: str) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Every flag, with its choices where there are some, and its default."""
    found = {}
    for parameter in inspect.signature(stage_command(STAGE_COMMANDS[name])).parameters.values():
        kind, described = (*get_args(parameter.annotation), None, None)[:2]
        if isinstance(described, OptionInfo):
            members = (kind, *get_args(kind))
            choices = next((get_args(each) for each in members if get_origin(each) is Literal), ())
            written = described.default  # within Annotated its first argument is no default but the flag
            flag = written if isinstance(written, str) else "--" + parameter.name.replace("_", "-")
            found[flag] = choices, parameter.default
    return found


def calls(name: str) -> list[list[str]]:
    return [command.words for command in COMMANDS.values() if command.words[0] == name]


def test_every_command_that_touches_weights_runs_at_real_shapes():
    ran = {command.words[0] for command in COMMANDS.values()}
    assert ran == {*STAGE_COMMANDS, *PIPELINE_COMMANDS} - PIPELINE_WITHOUT_WEIGHTS.keys()


@pytest.mark.parametrize("name", STAGE_COMMANDS)
def test_every_option_that_touches_weights_is_among_them(name: str):
    given = {word for words in calls(name) for word in words if word.startswith("--")}
    known = options(name).keys()
    assert given <= known
    assert known - given - WITHOUT_WEIGHTS.keys() == set()


def test_every_choice_of_such_an_option_is_made_by_some_command():
    known: dict[str, set[str]] = {}
    chosen: dict[str, set[str]] = {}
    for name in STAGE_COMMANDS:
        for flag, (choices, default) in options(name).items():
            if choices and flag not in WITHOUT_WEIGHTS:
                known.setdefault(flag, set()).update(choices)
                chosen.setdefault(flag, set()).update(value_of(flag, words, default) for words in calls(name))
    types = {word.rpartition("=")[2] for words in calls("quantize") for word in words if "=" in word}
    for flag in ("--type", "--output-type", "--embedding-type"):  # each a type for some matrices
        types |= chosen[flag]
    for flag in known:
        assert known[flag] <= (types if flag.endswith("type") and flag != "--dtype" else chosen[flag]), flag


def value_of(flag: str, words: list[str], default: Any) -> str:
    return words[words.index(flag) + 1] if flag in words else str(default)
