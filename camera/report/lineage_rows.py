"""Lineage as lines of a table: the sources, then every stage after the stages it reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

_SHORT = 12


@dataclass(frozen=True)
class LineageRow:
    """One source or stage."""

    step: str
    key: str
    """Twelve digits of the stage's key; empty for a source."""
    digest: str
    """Twelve digits of the content digest."""
    reads: tuple[str, ...]
    """The steps and sources that it was made from."""


def lineage_rows(lineage: Mapping[str, Any]) -> list[LineageRow]:
    """The entries of a lineage document (`{"sources": {digest: …}, "stages": {key: …}}`); none if it is empty."""
    sources: Mapping[str, Any] = lineage.get("sources", {})
    stages: Mapping[str, Any] = lineage.get("stages", {})
    names = {digest: _source_name(entry) for digest, entry in sources.items()}
    names |= {str(entry.get("digest", key)): str(entry.get("step", key)) for key, entry in stages.items()}
    rows = [
        LineageRow(names[digest], "", digest[:_SHORT], ())
        for digest in sorted(sources, key=lambda digest: (names[digest], digest))
    ]
    for key in _in_order(stages):
        entry = stages[key]
        given = [str(source.get("digest", "")) for source in entry.get("inputs", {}).values()]
        rows.append(
            LineageRow(
                str(entry.get("step", entry.get("stage", key))),
                key[:_SHORT],
                str(entry.get("digest", ""))[:_SHORT],
                tuple(dict.fromkeys(names.get(digest, digest[:_SHORT]) for digest in given)),
            )
        )
    return rows


def made_with(lineage: Mapping[str, Any]) -> list[str]:
    """Code and package versions of the stages, each once."""
    found: dict[str, None] = {}
    for entry in lineage.get("stages", {}).values():
        environment = entry.get("environment", {})
        for name in ("camera", "commit", "python", "machine"):
            if environment.get(name):
                value = str(environment[name])
                found[
                    f"{name} {value[:_SHORT] + ('+' if value.endswith('+') else '') if name == 'commit' else value}"
                ] = None
        for name, version in environment.get("packages", {}).items():
            found[f"{name} {version}"] = None
    return list(found)


def _source_name(entry: Mapping[str, Any]) -> str:
    """What a source is, without the folders that lead to it on this machine."""
    path = PurePath(str(entry.get("path", "")))
    shown = path.name if path.is_absolute() else str(path)
    return (
        f"{entry.get('name', 'source')}: {shown}" if entry.get("path") else str(entry.get("name", "source"))
    )


def _in_order(stages: Mapping[str, Any]) -> list[str]:
    """Keys, each after those of its inputs; among equals by step."""
    ordered: dict[str, None] = {}
    waiting = sorted(stages, key=lambda key: (str(stages[key].get("step", "")), key))
    while waiting:
        ready = [
            key
            for key in waiting
            if all(
                given.get("key") not in stages or given["key"] in ordered
                for given in stages[key].get("inputs", {}).values()
            )
        ]
        ordered |= dict.fromkeys(
            ready or waiting
        )  # a circle cannot be: but never wait forever for a damaged file
        waiting = [key for key in waiting if key not in ordered]
    return list(ordered)
