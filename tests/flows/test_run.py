"""Whole runs, for real: through Prefect and without, killed, damaged, resumed, audited."""

import json
import signal
import sqlite3
from collections.abc import Callable

import pytest

from tests.flows.conftest import Workplace, flip_a_bit
from tests.flows.steps import STEPS

States = Callable[[str], dict[str, str]]

pytestmark = pytest.mark.slow


def test_a_run_publishes_and_the_next_one_takes_everything_from_the_store(
    workplace: Workplace, states: States
):
    first = workplace.camera("run", "recipe.yaml", "--no-prefect")
    assert states(first.stdout) == dict.fromkeys(STEPS, "done")
    published = workplace.folder / "published" / "tiny"
    names = {path.name for path in published.iterdir()}
    assert {"config.json", "README.md", "lineage.json", "report.html", "results.json"} <= names
    assert {"tiny-q4_0_64.gguf", "tiny-q4_0_64-q4_0-twin.gguf", "tokenizer.model"} <= names

    second = workplace.camera("run", "recipe.yaml", "--no-prefect")
    assert states(second.stdout) == dict.fromkeys(STEPS, "cached")


def test_prefect_and_the_plain_loop_resume_what_the_other_left(workplace: Workplace, states: States):
    workplace.stop_at("running  convert baseline", "run", "recipe.yaml", "--no-prefect")
    done_by_the_loop = STEPS[: STEPS.index("convert baseline")]

    through_prefect = states(workplace.camera("run", "recipe.yaml").stdout)
    assert [step for step in STEPS if through_prefect[step] == "cached"] == done_by_the_loop

    again_through_prefect = states(workplace.camera("run", "recipe.yaml").stdout)
    assert again_through_prefect == dict.fromkeys(STEPS, "cached")
    in_the_loop = states(workplace.camera("run", "recipe.yaml", "--no-prefect").stdout)
    assert in_the_loop == dict.fromkeys(STEPS, "cached")


def test_after_kill_9_under_prefect_only_unfinished_stages_execute(workplace: Workplace, states: States):
    workplace.stop_at("running  quantize", "run", "recipe.yaml")
    after = states(workplace.camera("run", "recipe.yaml").stdout)
    cached = [step for step in STEPS if after[step] == "cached"]
    assert cached == STEPS[: STEPS.index("quantize")]
    runs = mlflow_runs(workplace)
    assert [run["status"] for run in runs] == ["FINISHED"], (
        "a killed run is continued and closed, not doubled"
    )


@pytest.mark.parametrize("prefect", [True, False], ids=["prefect", "loop"])
def test_a_damaged_artifact_alone_is_made_again(workplace: Workplace, states: States, prefect: bool):
    how = ("run", "recipe.yaml") if prefect else ("run", "recipe.yaml", "--no-prefect")
    workplace.camera(*how)
    (file,) = workplace.store.glob("score/*/scores.safetensors")
    flip_a_bit(file)

    after = states(workplace.camera(*how).stdout)
    assert {step for step, state in after.items() if state == "done"} == {"score"}


def test_ctrl_c_stops_cleanly_and_the_run_goes_on_later(workplace: Workplace, states: States):
    code = workplace.stop_at(
        "running  evaluate pruned", "run", "recipe.yaml", "--no-prefect", with_signal=signal.SIGINT
    )
    assert code == 130
    assert [run["status"] for run in mlflow_runs(workplace)] == ["KILLED"]
    after = states(workplace.camera("run", "recipe.yaml", "--no-prefect").stdout)
    assert after["evaluate baseline held-out"] == "cached"
    assert [run["status"] for run in mlflow_runs(workplace)] == ["FINISHED"]


def test_a_change_of_one_option_redoes_what_depends_on_it_and_no_more(workplace: Workplace, states: States):
    workplace.camera("run", "recipe.yaml", "--no-prefect", "--set", "capture.propagate=one-shot")
    after = states(
        workplace.camera(
            "run",
            "recipe.yaml",
            "--no-prefect",
            *("--set", "capture.propagate=one-shot"),
            *("--set", "prune.ratio=0.7"),
        ).stdout
    )
    assert {step for step in STEPS if after[step] == "cached"} == {
        "fetch calibration",
        "capture",
        "score",
        "quantize baseline",
        "convert baseline",
        "fetch held-out",
        "evaluate original held-out",
        "evaluate baseline held-out",
    }


def test_ratio_0_publishes_the_source_byte_for_byte(workplace: Workplace):
    workplace.camera("run", "recipe.yaml", "--no-prefect", "--set", "prune.ratio=0")
    published, source = workplace.folder / "published" / "tiny", workplace.folder / "model"
    for path in source.iterdir():
        assert (published / path.name).read_bytes() == path.read_bytes(), path.name


def test_plan_says_what_run_then_does(workplace: Workplace, states: States):
    before = json.loads(workplace.camera("plan", "recipe.yaml", "--json").stdout)
    assert not workplace.store.exists() or not any(workplace.store.glob("*/*"))
    assert [step["step"] for step in before["steps"]] == STEPS
    assert before["disk_bytes"] > 0
    workplace.camera("run", "recipe.yaml", "--no-prefect")
    after = json.loads(workplace.camera("plan", "recipe.yaml", "--json").stdout)
    assert {step["state"] for step in after["steps"]} == {"cached"}


def test_audit_follows_a_published_model_back_and_names_what_does_not_match(
    workplace: Workplace,
):
    workplace.camera("run", "recipe.yaml", "--no-prefect")
    published = workplace.folder / "published" / "tiny"
    for path in (published, published / "tiny-q4_0_64.gguf"):
        good = workplace.camera("audit", str(path))
        assert good.stdout.startswith("✓ verified: ")

    (kept,) = workplace.store.glob("prune/*/kept.safetensors")
    flip_a_bit(kept)
    bad = workplace.camera("audit", str(published), check=False)
    assert bad.returncode == 1
    assert "kept.safetensors" in bad.stderr

    gguf = published / "tiny-q4_0_64.gguf"
    flip_a_bit(gguf)
    bad = workplace.camera("audit", str(gguf), check=False)
    assert bad.returncode == 1
    assert "bytes of tiny-q4_0_64.gguf" in bad.stderr


def test_a_damaged_publication_is_published_again(workplace: Workplace, states: States):
    workplace.camera("run", "recipe.yaml", "--no-prefect")
    config = workplace.folder / "published" / "tiny" / "config.json"
    good = config.read_bytes()
    config.write_bytes(good + b" ")
    after = states(workplace.camera("run", "recipe.yaml", "--no-prefect").stdout)
    assert {step for step, state in after.items() if state == "done"} == {"publish"}
    assert config.read_bytes() == good


def mlflow_runs(workplace: Workplace) -> list[dict[str, str]]:
    """Status and key of every MLflow run of a workplace, read from its database."""
    with sqlite3.connect(workplace.folder / ".camera" / "mlflow.db") as database:
        rows = database.execute(
            "select run_uuid, status from runs where lifecycle_stage = 'active'"
        ).fetchall()
    return [{"run": run, "status": status} for run, status in rows]
