"""What exists: runs and published models; signing, promoting and rolling back."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from camera.cli.options import Json
from camera.cli.output import note, print_json, print_table, say
from camera.escape import one_line
from flows.commands.shared import Signers, check_signers, here

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime

    from rich.text import Text

    from tasks.registry import Version
    from tasks.runs import Run

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Of a published model: tiny, tiny@3.", show_default=False)
]
Alias = Annotated[str, typer.Option(help="The alias in the registry.")]
RequireSignature = Annotated[
    bool, typer.Option("--require-signature", help="Refuse a model that nobody of --signers signed.")
]


def runs(
    name: Annotated[str | None, typer.Argument(help="Only of this recipe.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
    as_json: Json = False,
) -> None:
    """List the runs that MLflow holds, newest first: status, start, duration, key figures, and what was published.

    Examples: `camera runs`  `camera runs tiny-openpangu-p20 --limit 5 --json`
    """
    from tasks import registry
    from tasks.runs import list_runs

    here()
    found = list_runs(limit, name)
    versions = {version.run_id: version for version in registry.versions() if version.run_id}
    if as_json:
        print_json([_run_json(run, versions.get(run.run_id)) for run in found])
    elif not found:
        say("no runs yet: `camera run RECIPE` makes one")
    else:
        columns = (
            "run",
            "recipe",
            "status",
            "started",
            ">duration",
            "perplexity",
            ">decode",
            "gate",
            "published",
        )
        print_table(columns, (_run_cells(run, versions.get(run.run_id)) for run in found))


def show(
    name: Annotated[
        str, typer.Argument(help="A published model (tiny, tiny@3) or a run's id.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Show one run or published model: figures, recipe, artifacts, versions, and who held `production`.

    Examples: `camera show tiny-openpangu-p20`  `camera show 1f6e03a2`
    """
    from rich.text import Text

    from tasks import promotion, registry

    here()
    run, version = _run_or_version(name)
    model = version.name if version is not None else run.name if run is not None else name
    document: dict[str, Any] = {
        "run": None if run is None else {**_run_json(run, version), "recipe": run.parameters},
        "versions": [_version_json(entry) for entry in registry.versions(model)],
        "production": list(map(vars, promotion.history(model))),
    }
    if as_json:
        print_json(document)
        return
    if version is not None:
        document = {"model": version.label, "GGUF": version.gguf_digests, **document}
    print_table(("", ""), ((Text(one_line(label), "bold"), text) for label, text in _rows(document)))


def _rows(value: Any, label: str = "") -> "Iterator[tuple[str, str]]":
    """A document as lines for people: the way to each value, and the value."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _rows(part, f"{label} {name.replace('_', ' ')}".strip())
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for part in value:
            words = (" ".join(each) if isinstance(each, tuple) else each for each in part.values())
            yield label, "  ".join(str(each) for each in words if each not in (None, ""))
    elif value not in (None, "None", [], ()):
        yield label, f"{value:.5g}" if isinstance(value, float) else str(value)


def sign(
    model: Annotated[str, typer.Argument(help="A published folder, or its name.", show_default=False)],
    key: Annotated[Path, typer.Option(help="A private SSH key; or a public one whose key the agent holds.")],
) -> None:
    """Sign the lineage of a published model with an SSH key. The signature lies beside the folder; nothing in it changes.

    Verify with `camera audit MODEL --require-signature --signers FILE`.

    Example: `camera sign published/tiny-openpangu-p20 --key ~/.ssh/id_ed25519`
    """
    from camera.errors import CameraError
    from tasks import signing
    from tasks.published import audit_found, located
    from tasks.store import Store

    store = Store(here().store)

    def wrongs(folder: Path) -> list[str]:
        note(f"auditing {one_line(found.label)}")
        audited = audit_found(found, store, from_remote=False, signers=None, signed=False)
        # What is wrong with a signature is what signing mends.
        return [f"{part.name}: {part.detail}" for part in audited.all_of("wrong") if part.name != "signature"]

    with located(model) as found:
        if found.copy_of is not None:
            raise CameraError(f"{found.label}: a later version lies in its folder; sign the newest")
        signed = signing.sign(found.path, key, store, wrongs)
        say(f"signed by {signed.record.signer}: {signed.path}")
        if signed.recorded:
            say(
                f"recorded in {' and '.join(signed.recorded)}: from now on it must be signed to pass an audit"
            )


def promote(
    name: Name,
    version: Annotated[
        int | None, typer.Option(help="The default is the newest.", show_default=False)
    ] = None,
    alias: Alias = "production",
    signers: Signers = None,
    require_signature: RequireSignature = False,
    as_json: Json = False,
) -> None:
    """Audit a published model, hold it to its quality gate, and give it the alias `production`.

    Exit code 0: it has the alias; 2: the audit or the gate failed, which is said, and the alias stays where it was.

    Examples: `camera promote tiny-openpangu-p20`  `camera promote tiny-openpangu-p20 --version 3`
    """
    from tasks import registry

    here()
    wanted = registry.find_version(name if version is None else f"{name.partition('@')[0]}@{version}")
    _give(wanted, alias, "promote", signers, require_signature, as_json)


def rollback(
    name: Name,
    alias: Alias = "production",
    signers: Signers = None,
    require_signature: RequireSignature = False,
    as_json: Json = False,
) -> None:
    """Give the alias `production` back to the version that had it before. That version is audited first.

    Exit code 0: done; 2: nothing had the alias before, or the audit failed; the alias stays where it was.

    Example: `camera rollback tiny-openpangu-p20`
    """
    from tasks import promotion

    here()
    _give(promotion.previous_holder(name, alias), alias, "rollback", signers, require_signature, as_json)


def _give(
    version: "Version", alias: str, how: str, signers: Path | None, require_signature: bool, as_json: bool
) -> None:
    from tasks import promotion, signing
    from tasks.published import Found, audit_found
    from tasks.store import Store

    store = Store(here().store)
    trust = signing.trust(store, signers, require_signature)
    check_signers(trust.signers, bool(trust.required))

    def audited(folder: Path) -> list[str]:
        note(f"auditing {one_line(version.label)}")
        published = Found(version.label, folder, version)
        found = audit_found(published, store, from_remote=False, signers=signers, signed=require_signature)
        wrong = [f"{part.name}: {part.detail}" for part in found.all_of("wrong")]
        signed = signing.judge(folder, store, signers=signers, required=require_signature, version=version)
        if (
            signed is not None
            and not signed.holds
            and not any(line.startswith("signature: ") for line in wrong)
        ):
            wrong.append(f"signature: {signed.detail}")
        return wrong

    gate = promotion.promote(version, audited, alias, how, store)
    if as_json:
        print_json({"model": version.name, "version": version.number, "alias": alias, "gate": gate})
    else:
        say(f"{version.label} is {alias}: its audit found nothing wrong; {gate}")


def _key_figures(run: "Run") -> dict[str, dict[str, float]]:
    """Perplexity by text and decode time by engine and length, of the pruned and quantised model."""
    perplexity, decode = {}, {}
    for name, value in run.metrics.items():
        stage, *middle, last = name.split("/")
        if stage == "evaluate" and last == "perplexity" and _is_result(middle[0]):
            perplexity[middle[1]] = value
        if stage == "benchmark" and last.endswith(".decode_ms_per_token"):
            model, engine, tokens = last.removesuffix(".decode_ms_per_token").rsplit(".", 2)
            if _is_result(model):
                decode[f"{engine} {tokens}"] = value
    return {"perplexity": perplexity, "decode_ms_per_token": decode}


def _is_result(model: str) -> bool:
    return model.replace("_", "+") == "pruned+quantized"


def _run_or_version(name: str) -> "tuple[Run | None, Version | None]":
    """A run by the beginning of its id, or a published model and the run that made it."""
    from camera.errors import CameraError
    from tasks import registry
    from tasks.runs import find_run, list_runs

    newest = list_runs(name=name.partition("@")[0], limit=1)
    try:
        version = registry.find_version(name)
    except CameraError:
        if newest and "@" not in name:
            return newest[0], None
        runs = [run for run in list_runs() if run.run_id.startswith(name)] if len(name) >= 4 else []
        if len(runs) != 1:
            raise
        made = [entry for entry in registry.versions(runs[0].name) if entry.run_id == runs[0].run_id]
        return runs[0], made[0] if made else None
    return (find_run(version.run_id) if version.run_id else None), version


def _run_cells(run: "Run", version: "Version | None") -> "tuple[str | Text, ...]":
    from camera.units import seconds_text

    figures = _key_figures(run)
    return (
        run.run_id[:8],
        run.name,
        run.status.lower(),
        _local(run.started),
        "" if run.seconds is None else seconds_text(run.seconds),
        _stacked(f"{text} {value:.4g}" for text, value in figures["perplexity"].items()),
        _stacked(f"{row} {value:.3g} ms" for row, value in figures["decode_ms_per_token"].items()),
        run.tags.get("gate", ""),
        "" if version is None else " ".join([version.label, *version.aliases]),
    )


def _stacked(lines: "Iterable[str]") -> "Text":
    from rich.text import Text

    return Text("\n".join(map(one_line, lines)))


def _run_json(run: "Run", version: "Version | None") -> dict[str, Any]:
    plain = ("run_id", "name", "experiment", "status", "started", "ended", "seconds", "digests")
    return {
        **{name: getattr(run, name) for name in plain},
        "gate": run.tags.get("gate"),
        **_key_figures(run),
        "published": None if version is None else _version_json(version),
    }


def _version_json(version: "Version") -> dict[str, Any]:
    plain = ("name", "aliases", "created", "folder", "lineage_digest", "dvc_md5", "run_id")
    return {"version": version.number, **{name: getattr(version, name) for name in plain}}


def _local(time: "datetime") -> str:
    return time.astimezone().strftime("%Y-%m-%d %H:%M")
