"""The lineage inside a GGUF file."""

import json
from pathlib import Path
from typing import Any

from camera.errors import CameraError
from camera.formats.gguf_parser import LINEAGE_KEY, read_metadata
from tasks.audit.finding import Finding, verified, wrong
from tasks.lineage import portable
from tasks.lineage_form import check_lineage


def embedded(path: Path) -> dict[str, Any] | None:
    """The lineage in a GGUF file; None if it holds none.

    Raises:
        CameraError: if the file is no GGUF, or what it holds is no lineage.
    """
    text = read_metadata(path).get(LINEAGE_KEY)
    if text is None:
        return None
    try:
        return check_lineage(json.loads(text), f"{LINEAGE_KEY} in {path}")
    except (ValueError, TypeError, RecursionError):
        raise CameraError(f"{path}: {LINEAGE_KEY} is not JSON") from None


def lineage_inside(path: Path, lineage: dict[str, Any]) -> Finding:
    """Whether the lineage in a GGUF file is that of the stage `convert` in another."""
    name = f"lineage inside {path.name}"
    try:
        inside = embedded(path)
    except CameraError as error:
        return wrong(name, str(error))
    if inside is None:
        return wrong(name, "there is none")
    known = portable(lineage)
    for part in ("stages", "sources"):
        if any(known[part].get(key) != entry for key, entry in inside[part].items()):
            return wrong(name, "does not agree with lineage.json")
    converted = [entry for entry in lineage["stages"].values() if entry["stage"] == "convert"]
    if not any(_ancestors(entry, lineage) <= inside["stages"].keys() for entry in converted):
        return wrong(name, "is not of what `convert` read in lineage.json")
    return verified(name, "agrees with lineage.json")


def _ancestors(entry: dict[str, Any], lineage: dict[str, Any]) -> set[str]:
    """Keys of the stages that an entry descends from."""
    waiting, found = [entry], set[str]()
    while waiting:
        for given in waiting.pop()["inputs"].values():
            key = given["key"]
            if key in lineage["stages"] and key not in found:
                found.add(key)
                waiting.append(lineage["stages"][key])
    return found
