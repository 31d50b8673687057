"""`camera sweep` and the quality gate's exit codes, on the command line, for real."""

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import yaml

from tests.flows.conftest import Workplace
from tests.flows.test_deployment import Api, served  # noqa: F401 (a fixture)


@pytest.fixture
def sweep(workplace: Workplace) -> Workplace:
    """A workplace whose recipe is a sweep of two ratios."""
    content = yaml.safe_load(workplace.recipe.read_text())
    content["capture"]["propagate"] = "one-shot"
    content["sweep"] = {"ratios": [0.4, 0.7]}
    workplace.recipe.write_text(yaml.safe_dump(content))
    return workplace


def done(output: str) -> Counter[str]:
    """How often each step was performed, read from the plain lines of a sweep."""

    def steps() -> Iterator[str]:
        for line in output.splitlines():
            _, _, told = line.partition(": done     ")
            if told:
                yield told.rpartition(" in ")[0]

    return Counter(steps())


def test_a_dry_run_shows_what_is_shared_and_makes_nothing(sweep: Workplace) -> None:
    plan = json.loads(sweep.camera("sweep", "recipe.yaml", "--dry-run", "--json").stdout)
    assert [member["name"] for member in plan["members"]] == ["tiny-p40", "tiny-p70"]
    assert plan["steps"]["capture"] == {"run": 1, "shared": 1}
    assert plan["steps"]["prune"] == {"run": 2}
    assert not sweep.store.exists() or not any(sweep.store.glob("*/*"))


def test_a_wrong_list_and_a_recipe_of_the_other_kind_are_told_with_exit_code_2(sweep: Workplace) -> None:
    for arguments, words in (
        (("sweep", "recipe.yaml", "--set", "sweep.ratios=[0.4,1.5]"), "sweep.ratios.1: 1.5 is not below 1"),
        (("sweep", "recipe.yaml", "--set", "sweep=null"), "camera run"),
        (("run", "recipe.yaml", "--no-prefect"), "camera sweep"),
    ):
        told = sweep.camera(*arguments, check=False)
        assert (told.returncode, words in told.stderr) == (2, True), told.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_after_kill_9_a_sweep_goes_on_and_redoes_nothing(sweep: Workplace) -> None:
    sweep.stop_at("tiny-p70: running  evaluate", "sweep", "recipe.yaml", "--no-prefect")
    ended = sweep.camera("sweep", "recipe.yaml", "--no-prefect", "--json")
    again = done(ended.stderr)
    assert again.keys() == {
        "evaluate pruned held-out",
        "evaluate pruned+quantized held-out",
        "benchmark",
        "report",
    }
    assert set(again.values()) == {1}
    found = json.loads(ended.stdout)
    assert [row["failure"] for row in found["results"]["rows"]] == [None, None]
    assert found["published"] == {}
    assert not (sweep.folder / "published").exists()
    with sqlite3.connect(sweep.folder / ".camera" / "mlflow.db") as database:
        statuses = database.execute("select name, status from runs").fetchall()
        nested = database.execute("select value from tags where key = 'mlflow.parentRunId'").fetchall()
    assert sorted(statuses) == [(name, "FINISHED") for name in ("tiny", "tiny-p40", "tiny-p70")]
    assert len(nested) == 2
    assert len(set(nested)) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_prefect_runs_members_in_threads_and_takes_what_the_loop_made(sweep: Workplace) -> None:
    sweep.camera("sweep", "recipe.yaml", "--no-prefect", "--set", "sweep.ratios=[0.4]")
    ended = sweep.camera(
        *("sweep", "recipe.yaml", "--workers", "2", "--set", "sweep.ratios=[0.1,0.4,0.7]"), check=False
    )
    assert ended.returncode == 1, (
        "192 channels less 10 % round up to 192: that member fails, the others do not"
    )
    assert "nothing would be pruned" in ended.stderr
    assert done(ended.stdout)["capture"] == 0
    assert done(ended.stdout)["prune"] == 1
    assert "tiny-p70: done" in ended.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_fails_its_gate_exits_with_3_and_a_looser_gate_publishes_from_the_store(
    workplace: Workplace,
) -> None:
    require = "publish.require.perplexity_increase"
    failed = workplace.camera("run", "recipe.yaml", "--no-prefect", "--set", f"{require}=-0.9", check=False)
    assert failed.returncode == 3
    assert "perplexity_increase on held-out: " in failed.stderr
    assert "points too much" in failed.stderr
    assert "withheld publish" in failed.stdout
    assert not (workplace.folder / "published").exists()
    passed = workplace.camera("run", "recipe.yaml", "--no-prefect", "--set", f"{require}=1000")
    ran = [line.split()[1] for line in passed.stdout.splitlines() if line.startswith("done ")]
    assert ran == ["report", "publish"]
    assert (workplace.folder / "published" / "tiny" / "lineage.json").is_file()
    assert workplace.camera("audit", "published/tiny").stdout.startswith("✓ verified: ")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_whose_worker_is_killed_is_scheduled_again_and_redoes_nothing(
    sweep: Workplace,
    served: dict[str, Any],  # noqa: F811
) -> None:
    api = Api(served)
    refused = api.run("sweep/sweep", {"recipe": "recipe.yaml", "overrides": ["sweep.ratois=[0.4]"]})
    assert refused.status_code in (409, 422), refused.text

    longer = ["benchmark.decode=[16]", "benchmark.repeats=60"]
    asked = api.run("sweep/sweep", {"recipe": "recipe.yaml", "overrides": longer}).raise_for_status().json()
    second_begins = time.monotonic() + 400
    while len(list(sweep.store.glob("report/*/manifest.json"))) < 1 or not any(
        sweep.store.glob("benchmark/.*.working")
    ):
        assert time.monotonic() < second_begins, api.state(asked["id"])
        time.sleep(0.1)
    [worker] = [service["pid"] for service in served["services"] if service["name"] == "worker-camera"]
    family = [psutil.Process(worker), *psutil.Process(worker).children(recursive=True)]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=20)
    before = made(sweep)
    assert len(list(sweep.store.glob("report/*/manifest.json"))) == 1, "one member is done, the other is not"

    back = json.loads(sweep.camera("serve", "--json").stdout)
    assert back["recovered"] == ["sweep recipe.yaml"]
    assert api.end_of(asked["id"])["type"] == "COMPLETED"
    after = made(sweep)
    assert {name: after.get(name) for name in before} == before, "what was finished is not made again"
    new = Counter(name.partition("/")[0] for name in after.keys() - before.keys())
    assert new == {"benchmark": 1, "report": 1, "sweep": 1}


def made(workplace: Workplace) -> dict[str, str]:
    """When each artifact was made."""
    found = workplace.store.glob("[!.]*/[!.]*/manifest.json")
    return {
        str(path.parent.relative_to(workplace.store)): json.loads(path.read_text())["created"]
        for path in found
    }
