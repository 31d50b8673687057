"""The alias `production`: who holds it, who held it before, and how it is given to another version.

MLflow's registry takes any source without checking. So an alias goes only to a version whose files were audited a
moment ago and held since, and the order of its holders is kept in a tag of the registered model.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from camera.errors import CameraError
from camera.escape import one_line
from camera.report.schema import read_results
from tasks.held import held
from tasks.mlflow_client import existing_registry, mlflow_client
from tasks.registry import PRODUCTION, Version, files_of, lineage_digest, models, versions
from tasks.store import Store

ROLLBACK = "rollback"
"""How an alias came back to who had it before."""
_HISTORY = "camera.history."
_REMEMBERED = 100


@dataclass(frozen=True)
class Holder:
    """One change of an alias."""

    version: int
    at: str
    how: str
    """`promote`, `rollback`, or `by hand`: set in MLflow by somebody."""


def promote(
    version: Version,
    audited: Callable[[Path], list[str]],
    alias: str = PRODUCTION,
    how: str = "promote",
    store: Store | None = None,
) -> str:
    """Give a version an alias, once its files are right and good enough, and are still what was looked at.

    Args:
        version: what to promote.
        audited: audits a published folder; what is wrong, in words.
        alias: usually `production`.
        how: for the history.
        store: the project's, which knows of publications that are not registered yet.

    Returns:
        What the quality gate said, in words.

    Raises:
        CameraError: if the audit or the quality gate fails, or the folder changes meanwhile; the alias stays where it was.
        NetworkError: if MLflow cannot be reached.
    """

    def refuse(reason: str, lines: Sequence[str] = ()) -> NoReturn:
        listed = "".join(f"\n  {one_line(line)}" for line in lines)
        raise CameraError(f"{version.label} cannot be {alias}: {reason}{listed}")

    with files_of(version, store) as folder, held(folder, version.folder) as unchanged:
        if lineage_digest(folder) != version.lineage_digest:
            refuse(f"{folder} holds another publication")
        if found := audited(folder):
            refuse("its audit fails", found)
        gate = read_results(folder / "results.json").gate
        if gate is not None and not gate.passed:
            refuse("it fails the quality gate", gate.reasons)
        unchanged()
        _give(version, alias, how)
    return "no quality gate in its recipe" if gate is None else "the quality gate passed"


def _give(version: Version, alias: str, how: str) -> None:
    """Set an alias, its history first: after a kill in between `history` sees that the last entry was not carried out."""
    with existing_registry() as client:
        now = next((each for each in versions(version.name) if each.number == version.number), None)
        if now is None or now.tags != version.tags:
            raise CameraError(
                f"{version.label} changed in the registry meanwhile: run the same command again"
            )
        if alias in now.aliases:
            return
        before = history(version.name, alias)
        if how == ROLLBACK and _before(version.name, before, alias).number != version.number:
            raise CameraError(f"{alias} was given to another version meanwhile: run the same command again")
        at = datetime.now(UTC).isoformat(timespec="seconds")
        holders = [*before, Holder(version.number, at, how)][-_REMEMBERED:]
        entries = json.dumps([vars(entry) for entry in holders])
        client.set_registered_model_tag(version.name, _HISTORY + alias, entries)
        client.set_registered_model_alias(version.name, alias, str(version.number))


def previous_holder(name: str, alias: str = PRODUCTION) -> Version:
    """The version that had an alias before the one that has it now.

    Raises:
        CameraError: if there is none.
        NetworkError: if MLflow cannot be reached.
    """
    return _before(name, history(name, alias), alias)


def _before(name: str, holders: list[Holder], alias: str) -> Version:
    stack: list[int] = []
    for holder in holders:
        if holder.how == ROLLBACK and stack:
            stack.pop()
        if not stack or stack[-1] != holder.version:
            stack.append(holder.version)
    known = {version.number: version for version in versions(name)}
    for number in reversed(stack[:-1]):
        if number in known:
            return known[number]
    raise CameraError(f"{name}: nothing had the alias {alias} before; see `camera show {name}`")


def history(name: str, alias: str = PRODUCTION) -> list[Holder]:
    """Who was given an alias, oldest first.

    Raises:
        NetworkError: if MLflow cannot be reached.
    """
    with mlflow_client() as client:
        found = [] if client is None else models(client, name)
    if not found:
        return []
    holder = dict(found[0].aliases).get(alias)
    return _carried_out(
        _holders(found[0].tags.get(_HISTORY + alias, "[]")), None if holder is None else int(holder)
    )


def _carried_out(recorded: list[Holder], holder: int | None) -> list[Holder]:
    """A history as the alias itself shows it: without what a kill kept from being done, with what was done by hand."""
    if holder is None:  # never given, or taken away by hand
        return recorded[:-1] if len(recorded) == 1 else recorded
    if recorded and recorded[-1].version == holder:
        return recorded
    if len(recorded) > 1 and recorded[-2].version == holder:
        return recorded[:-1]
    return [*recorded, Holder(holder, "", "by hand")]


def _holders(text: str) -> list[Holder]:
    """The entries of a history that can be read: somebody may have written the tag by hand."""
    try:
        return [Holder(int(one["version"]), str(one["at"]), str(one["how"])) for one in json.loads(text)]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
