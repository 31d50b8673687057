"""The README's commands run as printed, on a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


def commands() -> list[str]:
    """Every line of the README's shell blocks that calls `camera`, in order, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("camera ")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_camera_command_of_the_readme_runs_in_order(tmp_path: Path):
    assert len(commands()) >= 10
    for name in ("recipes", "dvc-remote", ".dvc", "data.dvc", ".dvcignore"):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(
                source, tmp_path / name, ignore=shutil.ignore_patterns("cache", "tmp", "config.local")
            )
        else:
            shutil.copy(source, tmp_path / name)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CAMERA_", "PREFECT_", "MLFLOW_"))
    }
    environment = {**kept, "PYTHONPATH": str(REPOSITORY)}
    for command in commands():
        arguments = command.split()[1:]
        if arguments[0] == "run":  # the same run, less of it: what is tested is that it runs
            arguments += ["--set", "benchmark.decode=[16]", "--set", "evaluate.max_windows=4"]
            arguments += ["--set", "calibration.samples=4", "--set", "benchmark.repeats=2"]
        done = subprocess.run(
            [sys.executable, "-m", "camera", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_every_local_link_of_the_documents_leads_somewhere():
    for page in (*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
