"""`camera serve` for real: a server, workers of two pools, a run that measures on the other pool, and the end of it all."""

import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from camera.devices import describe_device, resolve_device
from tests.flows.conftest import Workplace

REPOSITORY = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def served(workplace: Workplace) -> Iterator[dict[str, Any]]:
    """What `camera serve` prints, while it serves."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("flows", "recipes"):
        shutil.copytree(REPOSITORY / name, workplace.folder / name, ignore=ignored)
    shutil.copy(REPOSITORY / "prefect.yaml", workplace.folder)
    ports = ("--prefect-port", str(free_port()), "--mlflow-port", str(free_port()))
    try:
        known = json.loads(workplace.camera("serve", "--json", *ports).stdout)
        yield known | {"secret": workplace.camera("serve", "--secret").stdout.strip()}
    finally:
        workplace.camera("serve", "--stop")


class Api:
    """Prefect's API as any client sees it that knows the secret."""

    def __init__(self, served: dict[str, Any]) -> None:
        user, _, password = served["secret"].partition(":")
        self._client = httpx.Client(base_url=f"{served['prefect']}/api", timeout=60, auth=(user, password))

    def run(self, deployment: str, parameters: dict[str, Any]) -> httpx.Response:
        found = self._client.get(f"/deployments/name/{deployment}").raise_for_status().json()
        return self._client.post(
            f"/deployments/{found['id']}/create_flow_run", json={"parameters": parameters}
        )

    def ended(self, deployment: str, parameters: dict[str, Any], seconds: float = 400) -> dict[str, Any]:
        """Run a deployment to its end; the state."""
        return self.end_of(self.run(deployment, parameters).raise_for_status().json()["id"], seconds)

    def end_of(self, run: str, seconds: float = 400) -> dict[str, Any]:
        """Wait for the end of a run; the state."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            state = self.state(run)
            if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
                return state
            time.sleep(1)
        raise AssertionError(f"{run} has not ended after {seconds} s: {state}")

    def state(self, run: str) -> dict[str, Any]:
        return dict(self._client.get(f"/flow_runs/{run}").raise_for_status().json()["state"])

    def names(self, of: str) -> set[str]:
        answer = self._client.post(f"/{of}/filter", json={})
        return {entry["name"] for entry in answer.raise_for_status().json()}


def test_a_machine_serves_runs_and_stops(workplace: Workplace, served: dict[str, Any]):
    api = Api(served)
    assert {"nightly", "compress", "sweep", "benchmark-910b1", "audit"} <= api.names("deployments")
    assert {"camera", "ascend"} <= api.names("work_pools")
    assert any(name.endswith("-cpu-0") for name in api.names("v2/concurrency_limits"))
    assert "camera: close runs that show no sign of life" in api.names("automations")
    assert httpx.get(f"{served['mlflow']}/health", timeout=60).status_code == 200
    workplace.camera("serve", "--status")

    refused = api.run("compress/compress", {"recipe": "recipe.yaml", "overrides": ["prune.ratoi=0.3"]})
    assert refused.status_code in (409, 422), refused.text

    device = describe_device(resolve_device("cpu"))["name"]
    elsewhere = ["benchmark_host.deployment=benchmark/benchmark-910b1", "benchmark.device=cpu"]
    elsewhere += [f"benchmark_host.device_name={json.dumps(device)}"]
    given = {"recipe": "recipe.yaml", "overrides": [*elsewhere, "benchmark_host.start_within=2"]}
    alone = api.ended("compress/compress", given)
    assert alone["type"] == "FAILED"
    assert "no worker polls the work pool ascend" in alone["message"]
    assert not list(workplace.store.glob("benchmark/*"))

    before = [(service["name"], service["pid"]) for service in served["services"]]
    both = json.loads(workplace.camera("serve", "--json", "--pool", "camera", "--pool", "ascend").stdout)
    after = [(service["name"], service["pid"]) for service in both["services"]]
    assert after[: len(before)] == before, "what runs is left alone"
    assert [name for name, _ in after[len(before) :]] == ["worker-ascend"]
    done = api.ended("compress/compress", {"recipe": "recipe.yaml", "overrides": elsewhere})
    assert done["type"] == "COMPLETED", done
    assert len(list(workplace.store.glob("benchmark/*/manifest.json"))) == 1
    assert (workplace.folder / "published" / "tiny" / "lineage.json").is_file()

    audited = api.ended("audit/audit", {"published": "published"})
    assert audited["type"] == "COMPLETED", audited

    assert "worker-ascend" in workplace.camera("serve", "--stop").stdout
    assert workplace.camera("serve", "--status", check=False).returncode == 1
    assert not any(psutil.pid_exists(pid) for _, pid in after)
    assert workplace.camera("serve", "--stop").stdout == "nothing was running\n"
    again = workplace.camera("run", "recipe.yaml", "--no-prefect")
    ran = [line.split()[1] for line in again.stdout.splitlines() if line.startswith("running")]
    assert set(ran) <= {"benchmark", "report", "publish"}, (
        "what both workers made the command line finds; the recipe differs, and a speed measured elsewhere is filed "
        "without that host's versions, which this one cannot know"
    )
