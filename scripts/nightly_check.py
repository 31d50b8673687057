"""Does a night work? Everything for real, on loopback, in a temporary folder: `python scripts/nightly_check.py`.

Starts a Prefect server, a worker and the MLflow UI with `camera serve`; lets the cron deployment fire; is told of a
run that fails; kills worker and run with signal 9 in the middle of a stage and sees the run finish after a restart
with only the missing stages executed; audits; looks at the run's pages in a browser and clicks through to the report;
stops what it started. Ends with 0, or with 1 and the reason.
"""

import argparse
import base64
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from scripts.browser import Browser, find_browser  # noqa: E402

RECIPE: dict[str, Any] = {
    "name": "nightly",
    "model": "model",
    "calibration": {"samples": 4, "length": 128},
    "capture": {"dtype": "float32"},
    "quantize": {"twin": "q4_0"},
    "evaluate": {"datasets": [{"split": "test"}], "window": 128, "max_windows": 4, "dtype": "float32"},
    "benchmark": {"decode": [8], "repeats": 2},
}
INTERRUPTED = ["prune.ratio=0.5", "benchmark.repeats=60", "benchmark.decode=[16, 32]"]
"""What the run that is killed changes: everything from prune on is new, and its benchmark takes a while."""
AFTER_THE_KILL = {"benchmark", "report", "publish"}


class Receiver:
    """A web server on loopback that keeps what is posted to it."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        messages = self.messages

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                messages.append(json.loads(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()


class Night:
    """A project folder with its servers."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.store = folder / ".camera" / "store"
        (folder / "model").symlink_to(model.resolve())
        (folder / "flows").symlink_to(REPOSITORY / "flows")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        deployments = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())
        for deployment in deployments["deployments"]:
            given = deployment.get("parameters", {})
            if "recipes" in given:
                given["recipes"] = ["recipe.yaml"]
            if "recipe" in given:
                given["recipe"] = "recipe.yaml"
        (folder / "prefect.yaml").write_text(yaml.safe_dump(deployments))
        ours = ("PREFECT_", "MLFLOW_", "CAMERA_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self.environment = {**kept, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        self.served: dict[str, Any] = {}
        self.secret = ""

    def camera(self, *arguments: str) -> str:
        """Run a command to its end; what it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "camera", *arguments],
            cwd=self.folder, env=self.environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(
                f"camera {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def serve(self, *options: str) -> None:
        """`camera serve`, and this process becomes a client of its server."""
        self.served = json.loads(self.camera("serve", "--json", *options))
        os.environ["PREFECT_HOME"] = str(self.folder / ".camera" / "prefect")
        os.environ["PREFECT_API_URL"] = self.served["prefect"] + "/api"
        self.secret = self.camera("serve", "--secret").strip()
        os.environ["PREFECT_API_AUTH_STRING"] = self.secret
        os.environ["DO_NOT_TRACK"] = "true"

    def artifacts(self) -> dict[str, tuple[int, str]]:
        """Every finished artifact: its manifest's inode, and when it was made. Use alone changes other times."""
        return {
            str(path.parent.relative_to(self.store)): (
                path.stat().st_ino,
                json.loads(path.read_text())["created"],
            )
            for path in self.store.glob("*/*/manifest.json")
            if not path.parent.name.startswith(".")
        }

    def kill_worker(self) -> list[int]:
        """End the worker and all it started with signal 9; their pids."""
        worker = next(service for service in self.served["services"] if service["name"] == "worker-camera")
        process = psutil.Process(worker["pid"])
        family = [process, *process.children(recursive=True)]
        for member in family:
            member.kill()
        psutil.wait_procs(family, timeout=20)
        return [member.pid for member in family]

    def mlflow_statuses(self) -> list[str]:
        """Status of every MLflow run, from its database."""
        with sqlite3.connect(self.folder / ".camera" / "mlflow.db") as database:
            return [row[0] for row in database.execute("select status from runs order by start_time")]


def main() -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=REPOSITORY / "data" / "models" / "tiny-openpangu")
    parser.add_argument("--images", type=Path, help="write pictures of the run pages to this folder")
    parser.add_argument("--keep", action="store_true", help="leave the folder for a look")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        sys.exit(f"{arguments.model} is not there: run `dvc pull`, or give --model")
    folder = Path(tempfile.mkdtemp(prefix="nightly-check-"))
    night = Night(folder, arguments.model)
    began = time.monotonic()
    try:
        check(night, arguments.images)
    finally:
        with step("stop what was started"):
            night.camera("serve", "--stop")
            left = [process.pid for process in psutil.process_iter() if _works_in(process, folder)]
            expect(not left, f"processes {left} still work in {folder}")
        if arguments.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder)
    print(f"a night works: {time.monotonic() - began:.0f} s")


def check(night: Night, images: Path | None) -> None:
    """All that is claimed, in the order in which it happens."""
    receiver = Receiver()
    with step("camera serve: server, worker, MLflow UI, deployments"):
        night.serve("--webhook", receiver.url)
        night.camera("serve", "--status")
    from prefect.client.orchestration import get_client  # now that it knows which server

    with get_client(sync_client=True) as client:
        with step("the cron deployment fires and its run completes"):
            scheduled = fire_by_cron(client)
            wait_for_state(client, scheduled, "COMPLETED", 420)
            expect(night.mlflow_statuses() == ["FINISHED"], "the run is not FINISHED in MLflow")
        with step("a wrong parameter is refused by the server"):
            refused(client, {"recipes": ["recipe.yaml"], "overrides": ["prune.ratoi=0.5"]})
        with step("a recipe that fails does not stop the others, and somebody is told"):
            failing = start(client, {"recipes": ["missing.yaml", "recipe.yaml"]})
            ended = wait_for_state(client, failing, "FAILED", 240)
            expect("1 of 2 recipes failed" in ended.state.message, ended.state.message)
            wait(lambda: bool(receiver.messages), 60, "nothing was posted to the webhook")
            told = [message for message in receiver.messages if message["run"] == str(failing)]
            expect(len(told) == 1 and "missing.yaml" in told[0]["text"], f"posted: {receiver.messages}")
        with step("worker and run are killed in the middle of a stage"):
            before_the_run = night.artifacts()
            killed = start(client, {"recipes": ["recipe.yaml"], "overrides": INTERRUPTED})
            working = night.store / "benchmark"
            wait(lambda: any(working.glob(".*.working")), 300, "the benchmark stage did not begin")
            night.kill_worker()
            before = night.artifacts()
            expect(len(before) > len(before_the_run), "no stage had finished before the kill")
            expect("RUNNING" in night.mlflow_statuses(), "the kill came too late to leave a run open")
        with step("after a restart the run finishes, and only the missing stages are executed"):
            night.serve()
            expect(len(night.served["recovered"]) == 1, f"scheduled again: {night.served['recovered']}")
            ended = wait_for_state(client, killed, "COMPLETED", 420)
            expect(ended.run_count == 2, f"it was started {ended.run_count} times")
            after = night.artifacts()
            again = {name for name, made in before.items() if after.get(name) != made}
            expect(not again, f"finished stages were done again: {again}")
            made = {name.partition("/")[0] for name in after.keys() - before.keys()}
            expect(made == AFTER_THE_KILL, f"executed after the restart: {made}")
            expect(set(night.mlflow_statuses()) == {"FINISHED"}, f"MLflow: {night.mlflow_statuses()}")
        with step("audit of all published models"):
            audited = start(client, {"published": "published"}, "audit/audit")
            wait_for_state(client, audited, "COMPLETED", 240)
        run_page = f"{night.served['prefect']}/runs/flow-run/{scheduled}"
    program = find_browser()
    if program is None:
        print("skipped: the pages in a browser (no Chromium on the path)")
        return
    with step("the run's pages in a browser, and a click through to the report"):
        look(program, run_page, night, images)


def fire_by_cron(client: Any) -> Any:
    """Set the nightly schedule to the next minute that can still be met; the id of the run it makes."""
    from prefect.client.schemas.schedules import CronSchedule

    deployment = client.read_deployment_by_name("nightly/nightly")
    due = (datetime.now(UTC) + timedelta(seconds=80)).replace(second=0, microsecond=0)
    cron = f"{due.minute} {due.hour} * * *"
    client.update_deployment_schedule(
        deployment.id, deployment.schedules[0].id, schedule=CronSchedule(cron=cron, timezone="UTC")
    )
    found: list[Any] = []

    def appeared() -> bool:
        runs = runs_of(client, deployment.id)
        found[:] = [run.id for run in runs if run.auto_scheduled and run.expected_start_time == due]
        return bool(found)

    wait(appeared, 120, f"no run for {due:%H:%M} was scheduled by cron {cron!r}")
    return found[0]


def runs_of(client: Any, deployment_id: Any) -> list[Any]:
    """The flow runs of a deployment."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId

    deployment = FlowRunFilterDeploymentId(any_=[deployment_id])
    return list(client.read_flow_runs(flow_run_filter=FlowRunFilter(deployment_id=deployment)))


def start(client: Any, parameters: dict[str, Any], name: str = "nightly/nightly") -> Any:
    """Run a deployment now; the run's id."""
    deployment = client.read_deployment_by_name(name)
    return client.create_flow_run_from_deployment(deployment.id, parameters=parameters).id


def refused(client: Any, parameters: dict[str, Any]) -> None:
    """The server does not even make such a run."""
    try:
        start(client, parameters)
    except Exception as error:
        expect("ratoi" in str(error) or "422" in str(error) or "409" in str(error), str(error))
        return
    raise AssertionError(f"the server took {parameters}")


def wait_for_state(client: Any, run_id: Any, wanted: str, seconds: float) -> Any:
    """Wait for a run to end; it must end like this."""
    run: list[Any] = []

    def ended() -> bool:
        run[:] = [client.read_flow_run(run_id)]
        return bool(run[0].state and run[0].state.is_final())

    wait(ended, seconds, f"run {run_id} has not ended after {seconds:.0f} s")
    state = run[0].state
    expect(state.type.value == wanted, f"the run ended as {state.type.value}: {state.message}")
    return run[0]


def look(program: str, run_page: str, night: Night, images: Path | None) -> None:
    """Open the run's page in Prefect and in MLflow, click through to the report, take pictures."""
    with sqlite3.connect(night.folder / ".camera" / "mlflow.db") as database:
        run, experiment = database.execute(
            "select run_uuid, experiment_id from runs order by start_time"
        ).fetchone()
    with Browser(program) as browser:
        browser.open(night.served["prefect"])
        browser.keep(
            "prefect-password", base64.b64encode(night.secret.encode()).decode()
        )  # as its login page does
        browser.open(run_page, "Completed", "nightly", "Finished in state Completed()", seconds=120)
        if images is not None:
            browser.picture(images / "prefect-run.png", settle=5)
        mlflow = night.served["mlflow"]
        browser.sign_in(night.secret)
        browser.open(f"{mlflow}/#/experiments/{experiment}/runs/{run}", "nightly", "prune.ratio", seconds=120)
        if images is not None:
            browser.picture(images / "mlflow-run.png", settle=3)
        browser.click("Artifacts")
        browser.wait_for("report.html")
        browser.click("report.html")
        browser.wait_for("perplexity", seconds=40)
        if images is not None:
            browser.picture(images / "mlflow-report.png", settle=3)


def wait(holds: Callable[[], bool], seconds: float, complaint: str) -> None:
    """Wait until something holds."""
    until = time.monotonic() + seconds
    while not holds():
        expect(time.monotonic() < until, complaint)
        time.sleep(0.2)


def expect(holds: bool, complaint: str) -> None:
    """Fail unless something holds."""
    if not holds:
        raise AssertionError(complaint)


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.pid != os.getpid() and Path(process.cwd()).is_relative_to(folder)
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False


@contextmanager
def step(what: str) -> Iterator[None]:
    """Print what is checked, and how long it took."""
    began = time.monotonic()
    print(f"…  {what}", flush=True)
    try:
        yield
    except BaseException:
        print(f"✗  {what}", flush=True)
        raise
    print(f"✓  {what} ({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
