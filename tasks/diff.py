"""What changed between two published models: what was asked for, what it was made of and with, and what came out."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camera.errors import CameraError
from camera.pruning.summary import Pruned
from camera.report.schema import Results, read_results
from tasks.contents import kind
from tasks.lineage_form import read_publication
from tasks.runs import flatten
from tasks.store import LINEAGE, Store


@dataclass(frozen=True)
class Change:
    """One thing that is not the same."""

    section: str
    """recipe, data, code, versions, stages, quality, speed, size."""
    what: str
    before: Any
    """None where there is none."""
    after: Any


@dataclass(frozen=True)
class Overlap:
    """The kept channels of one decoder layer, in both models."""

    layer: int
    before: int
    after: int
    both: int

    @property
    def share(self) -> float:
        """Kept by both, of those that either keeps."""
        return self.both / max(self.before + self.after - self.both, 1)


@dataclass(frozen=True)
class Comparison:
    """Two published models."""

    changes: list[Change]
    overlap: list[Overlap]
    no_overlap: str | None
    """Why the kept channels cannot be compared."""


def compare(before: Path, after: Path, store: Store) -> Comparison:
    """Compare two published folders.

    Args:
        before, after: published folders.
        store: where the artifacts that say which channels were kept may be.

    Raises:
        CameraError: if one is not a published folder.
    """
    first, second = _lineage(before), _lineage(after)
    changes = [
        *_changes("recipe", flatten(first["recipe"]), flatten(second["recipe"])),
        *_changes("data", _data(first), _data(second)),
        *_changes("code", _code(first), _code(second)),
        *_changes("versions", _packages(first), _packages(second)),
        *_changes("stages", _stages(first), _stages(second)),
    ]
    results = read_results(before / "results.json"), read_results(after / "results.json")
    for section, measured in (("quality", _quality), ("speed", _speed), ("size", _size)):
        changes += _changes(section, measured(results[0]), measured(results[1]))
    try:
        overlap, reason = _overlaps(_kept(first, store), _kept(second, store)), None
    except CameraError as error:
        overlap, reason = [], str(error)
    return Comparison(changes, overlap, reason)


def _lineage(folder: Path) -> dict[str, Any]:
    if kind(folder / LINEAGE) is None:
        raise CameraError(f"{folder} has no {LINEAGE}: give published folders or names")
    return read_publication(folder)


def _changes(section: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    for what in sorted(before.keys() | after.keys()):
        if before.get(what) != after.get(what):
            yield Change(section, what, before.get(what), after.get(what))


def _data(lineage: dict[str, Any]) -> dict[str, str]:
    """Digests of the sources, by name and file, and of the tokens made of them."""
    found = {
        f"{entry['name']} {Path(entry['path']).name}": entry["digest"]
        for entry in lineage["sources"].values()
    }
    tokens = {e["step"]: e["digest"] for e in lineage["stages"].values() if e["stage"] == "fetch"}
    return {name: digest[:12] for name, digest in (found | tokens).items()}


def _code(lineage: dict[str, Any]) -> dict[str, str]:
    return _seen(
        {field: str(entry[field]) for field in ("camera", "commit", "python", "machine")}
        for entry in _environments(lineage)
    )


def _packages(lineage: dict[str, Any]) -> dict[str, str]:
    return _seen(entry["packages"] for entry in _environments(lineage))


def _seen(entries: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Every value of every field, where the stages of one model may have run with several."""
    found: dict[str, set[str]] = {}
    for entry in entries:
        for name, value in entry.items():
            found.setdefault(name, set()).add(value)
    return {name: ", ".join(sorted(values)) for name, values in found.items()}


def _environments(lineage: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry["environment"] for entry in lineage["stages"].values() if entry.get("environment")]


def _stages(lineage: dict[str, Any]) -> dict[str, int]:
    return {f"{entry['stage']} version": entry["version"] for entry in lineage["stages"].values()}


def _quality(results: Results) -> dict[str, float]:
    product = results.product
    measured = {} if product is None else product.perplexity
    return {f"perplexity on {text}": round(found.value, 4) for text, found in measured.items()}


def _speed(results: Results) -> dict[str, float]:
    title = None if results.product is None else results.product.title
    found: dict[str, float] = {}
    for row in results.benchmark:
        if row.model == title and row.decode_ms is not None:
            found[f"{row.engine}: decode {row.decode}, ms per token"] = round(row.decode_ms.median, 4)
        if row.model == title and row.prefill_ms is not None:
            found[f"{row.engine}: prefill, ms per token"] = round(row.prefill_ms.median, 4)
    return found


def _size(results: Results) -> dict[str, Any]:
    product = results.product
    if product is None:
        return {}
    experts = {"experts": product.experts} if product.experts else {}
    return {"bytes": product.bytes, "FFN channels": product.ffn_width, **experts}


def _kept(lineage: dict[str, Any], store: Store) -> list[set[tuple[str, int]]]:
    asked = lineage["recipe"].get("prune")
    entry = None
    for stage in lineage["stages"].values():  # others are of runs with other options and the same bytes
        options = stage["options"].get("prune", stage["options"])
        if not isinstance(asked, dict) or not isinstance(options, dict) or stage["stage"] != "prune":
            continue
        if all(asked.get(name, value) == value for name, value in options.items()):
            entry = stage
    if entry is None:
        raise CameraError(f"{lineage['name']}: nothing was pruned")
    artifact = store.find("prune", entry["key"])
    if artifact is None or artifact.digest != entry["digest"]:
        raise CameraError(
            f"{lineage['name']}: the artifact that says which channels were kept is not in this store"
        )
    layers = Pruned.open(artifact.path).stays()
    return [
        {(label, channel) for label, kept_K in stays.kept.items() for channel in kept_K.tolist()}
        for stays in layers
    ]


def _overlaps(before: list[set[tuple[str, int]]], after: list[set[tuple[str, int]]]) -> list[Overlap]:
    if len(before) != len(after):
        raise CameraError(f"the models have {len(before)} and {len(after)} layers")
    pairs = enumerate(zip(before, after, strict=True))
    return [Overlap(layer, len(first), len(second), len(first & second)) for layer, (first, second) in pairs]
