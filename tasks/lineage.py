"""Lineage: what an artifact descends from, back to the source model and the datasets, as plain JSON.

    {"schema": 1, "sources": {digest: {...}}, "stages": {key: {...}}}

Entries are found by content digest or key, so that documents of several inputs merge without conflict. It holds
no time and no run id: the same inputs, code and machine give the same document, and so the same GGUF. Its whole form
is in tasks/lineage_form.py.
"""

import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import camera
from camera.ascend.host import facts
from camera.files import read_json
from camera.versions import versions
from tasks.lineage_form import SCHEMA
from tasks.store import LINEAGE, MANIFEST

if TYPE_CHECKING:
    from tasks.stage import Input

_ENTRY_FIELDS = ("step", "stage", "version", "key", "digest", "options", "facts", "inputs", "environment")
_OUTCOME = ("experts_kept", "kept_width", "removed_share")


def ancestry(inputs: Mapping[str, "Input"]) -> dict[str, Any]:
    """The lineage of something made from these inputs: all their ancestors, and they themselves."""
    sources: dict[str, Any] = {}
    stages: dict[str, Any] = {}
    for name, given in sorted(inputs.items()):
        if given.stage is None:
            sources[given.digest] = {"name": name, "digest": given.digest, **given.about}
            continue
        earlier = read_json(given.path / LINEAGE)
        sources.update(earlier["sources"])
        stages.update(earlier["stages"])
        stages[str(given.key)] = stage_entry(read_json(given.path / MANIFEST))
    return {
        "schema": SCHEMA,
        "sources": dict(sorted(sources.items())),
        "stages": dict(sorted(stages.items())),
    }


def portable(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """A lineage as it goes into a file that others will hold: no machine, no commit, no absolute path.

    What stays decides the bytes, so that another commit that makes the same weights makes the same file.
    """

    def without_place(source: Mapping[str, Any]) -> dict[str, Any]:
        path = Path(source["path"])
        return {**source, "path": path.name if path.is_absolute() else source["path"]}

    def without_machine(stage: Mapping[str, Any]) -> dict[str, Any]:
        return {field: value for field, value in stage.items() if field != "environment"}

    return {
        "schema": lineage["schema"],
        "sources": {digest: without_place(source) for digest, source in lineage["sources"].items()},
        "stages": {key: without_machine(stage) for key, stage in lineage["stages"].items()},
    }


def stage_entry(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What lineage keeps of a manifest."""
    entry = {field: manifest[field] for field in _ENTRY_FIELDS if field in manifest}
    metrics = manifest.get("metrics", {})
    if "experts_kept" in metrics:  # the options leave open what a split comes to
        entry["outcome"] = {name: metrics[name] for name in _OUTCOME}
    return entry


def environment(device: str | None) -> dict[str, Any]:
    """Code, packages, machine kind and kind of device that a stage runs with; on an NPU CANN and driver are packages too."""
    found = _environment()
    if device is None:
        return found
    packages = found["packages"] | (_below_torch_npu() if device == "npu" else {})
    return {**found, "packages": packages, "device": device}


@cache
def _below_torch_npu() -> dict[str, str]:
    host = facts()
    found = {"cann": host.cann, "npu-driver": host.driver, "npu-firmware": host.firmware}
    return {name: version for name, version in found.items() if version is not None}


@cache
def _environment() -> dict[str, Any]:
    return {
        "camera": camera.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": versions(),
    }


def _commit() -> str | None:
    """The git commit of the code that runs, with `+` if files differ from it; None outside a checkout."""
    folder = Path(camera.__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", "__init__.py"
        )  # a wheel inside some other project's checkout is not it
        changed = git("status", "--porcelain", "--", ".", "../tasks", "../flows")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
