"""Lineage as a table: the sources, then every stage after the stages it reads."""

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import PurePath
from typing import Any

from camera.report.table import Grid

_SHORT = 12


def lineage_grid(lineage: Mapping[str, Any]) -> Grid:
    """The entries of a lineage document (`{"sources": {digest: …}, "stages": {key: …}}`); no rows if it is empty.

    Of keys and digests the first twelve digits; last, the steps and sources that a step was made from.
    """
    sources: Mapping[str, Any] = lineage.get("sources", {})
    stages: Mapping[str, Any] = lineage.get("stages", {})
    names = {digest: _source_name(entry) for digest, entry in sources.items()}
    names |= {str(entry.get("digest", key)): str(entry.get("step", key)) for key, entry in stages.items()}
    rows = [
        (names[digest], "source", digest[:_SHORT], "–")
        for digest in sorted(sources, key=lambda digest: (names[digest], digest))
    ]
    for key in _in_order(stages):
        entry = stages[key]
        given = [str(source.get("digest", "")) for source in entry.get("inputs", {}).values()]
        rows.append(
            (
                str(entry.get("step", entry.get("stage", key))),
                key[:_SHORT],
                str(entry.get("digest", ""))[:_SHORT] or "–",
                ", ".join(dict.fromkeys(names.get(digest, digest[:_SHORT]) for digest in given)) or "–",
            )
        )
    return Grid("What made what", ("step", "key", "content", "made from"), tuple(rows), words=4)


def made_with(lineage: Mapping[str, Any]) -> list[str]:
    """Code and package versions of the stages, each once."""
    found: dict[str, None] = {}
    for entry in lineage.get("stages", {}).values():
        environment = entry.get("environment", {})
        facts = {name: str(environment.get(name) or "") for name in ("camera", "commit", "python", "machine")}
        changed = "+" if facts["commit"].endswith("+") else ""
        facts["commit"] = facts["commit"][:_SHORT] + changed if facts["commit"] else ""
        facts |= environment.get("packages", {})
        found |= dict.fromkeys(f"{name} {value}" for name, value in facts.items() if value)
    return list(found)


def _source_name(entry: Mapping[str, Any]) -> str:
    """What a source is, without the folders that lead to it on this machine."""
    name, path = str(entry.get("name", "source")), PurePath(str(entry.get("path", "")))
    return f"{name}: {path.name if path.is_absolute() else path}" if entry.get("path") else name


def _in_order(stages: Mapping[str, Any]) -> list[str]:
    """Keys, each after those of its inputs; among equals by step."""

    def by_step(key: str) -> tuple[str, str]:
        return str(stages[key].get("step", "")), key

    sorter = TopologicalSorter(
        {
            key: [given["key"] for given in entry.get("inputs", {}).values() if given.get("key") in stages]
            for key, entry in stages.items()
        }
    )
    try:
        sorter.prepare()
    except CycleError:  # of a damaged file
        return sorted(stages, key=by_step)
    ordered: list[str] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=by_step)
        sorter.done(*ready)
        ordered += ready
    return ordered
