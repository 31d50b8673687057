"""The Dockerfiles cannot be built in CI, so what they name is held against the repository; `make check` lints them."""

import fnmatch
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from camera.ascend.pairing import ROWS, why_unpaired
from tests.conftest import REPOSITORY

FILES = sorted((REPOSITORY / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def instructions(file: Path) -> list[tuple[str, str]]:
    """Keyword and arguments of each instruction, continued lines joined."""
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined]


def of(file: Path, keyword: str) -> list[str]:
    return [arguments for name, arguments in instructions(file) if name == keyword]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the root from the builder: the last pattern that fits decides."""
    verdict = False
    for pattern in (REPOSITORY / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#") and fnmatch.fnmatch(path, pattern.lstrip("!")):
            verdict = not pattern.startswith("!")
    return verdict


def test_there_is_one_for_each_target() -> None:
    assert [file.name for file in FILES] == ["ascend.Dockerfile", "cpu.Dockerfile", "cuda.Dockerfile"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
class TestDockerfile:
    def test_what_is_copied_exists_and_reaches_the_builder(self, file: Path) -> None:
        sources = [source for copy in of(file, "COPY") for source in copy.split()[:-1]]
        assert {"constraints.txt", "pyproject.toml", "camera", "tasks", "flows"} <= set(sources)
        for source in sources:
            assert (REPOSITORY / source).exists()
            assert not ignored(source)

    def test_what_the_package_is_built_from_is_copied(self, file: Path) -> None:
        copied = " ".join(of(file, "COPY")).split()
        assert PROJECT["readme"] in copied
        assert set(PROJECT["license-files"]) <= set(copied)

    def test_pip_installs_from_the_constraints_what_the_project_declares(self, file: Path) -> None:
        installs = re.findall(r"pip install [^&]+", " ".join(of(file, "RUN")))
        local = [install for install in installs if " -e " in install]
        assert len(local) == 1
        assert "-c constraints.txt" in local[0]
        extras = re.search(r"\.\[([\w,]+)\]", local[0])
        assert extras
        assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])
        for install in installs:
            assert "-c constraints.txt" in install or "==${" in install  # every version comes from somewhere

    def test_every_variable_is_declared(self, file: Path) -> None:
        declared = {argument.partition("=")[0] for argument in of(file, "ARG")}
        used = set(re.findall(r"\$\{?(\w+)", " ".join(of(file, "FROM") + of(file, "RUN"))))
        assert used <= declared

    def test_it_runs_the_command_as_somebody_who_is_not_root(self, file: Path) -> None:
        assert of(file, "USER")[-1] == "10001"
        assert re.search(r"useradd --uid 10001\b", " ".join(of(file, "RUN")))
        assert "camera" in of(file, "ENTRYPOINT")[-1]

    def test_no_host_is_written_in_it(self, file: Path) -> None:
        assert not re.search(r"https?://|\w+\.(com|io|org|cn|ai)\b", file.read_text())


def test_the_ascend_image_pairs_torch_with_cann_and_torch_npu_with_torch() -> None:
    file = REPOSITORY / "docker/ascend.Dockerfile"
    torch = dict(argument.split("=", 1) for argument in of(file, "ARG") if "=" in argument)["TORCH"]
    assert why_unpaired(torch, torch, max(ROWS)) is None
    words = shlex.split(" ".join(of(file, "RUN")))
    assert "torch==${TORCH}" in words
    assert "torch-npu==${TORCH}" in words
    constraints = [
        line
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if line.startswith("torch==")
    ]
    assert len(constraints) == 1  # the line that the image takes out
