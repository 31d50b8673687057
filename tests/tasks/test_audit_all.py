"""Whatever lies below published/ is a line of `camera audit --all`; and an audit looks only where it is safe to look."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from camera.digests import digest_file, digest_json
from camera.errors import CameraError
from camera.files import read_json
from tasks.audit import audit
from tasks.audit.finding import Finding, Verdict
from tasks.lineage_form import read_lineage
from tasks.published import Found, audit_all, audit_found
from tasks.signing import signature_of
from tasks.stages.publish import still_holds
from tasks.store import Store
from tests.tasks.publications import Publication


def verdicts(made: Publication) -> dict[str, Verdict]:
    """What is said of each model below published/."""

    def auditing(found: Found) -> Finding:
        return audit_found(found, made.store, from_remote=False, signers=None, signed=False)

    found = audit_all(made.root / "published", made.store, auditing)
    return {Path(finding.name).name: finding.overall for finding in found}


def entry(made: Publication, text: str | bytes) -> None:
    folder = made.root / "published" / "bad"
    folder.mkdir()
    (folder / "lineage.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def changed(made: Publication, change: Callable[[dict[str, Any]], Any]) -> None:
    lineage = made.lineage()
    change(lineage)
    entry(made, json.dumps(lineage))


def not_a_file(made: Publication, make: Callable[[Path], Any]) -> None:
    folder = made.root / "published" / "bad"
    folder.mkdir()
    make(folder / "lineage.json")


BAD: dict[str, Callable[[Publication], None]] = {
    "no JSON": lambda made: entry(made, "{"),
    "no UTF-8": lambda made: entry(made, b"\xff\xfe{}"),
    "deep": lambda made: entry(made, "[" * 100_000),
    "deep in the recipe": lambda made: changed(
        made, lambda lineage: lineage["recipe"].update(x=json.loads("[" * 200 + "]" * 200))
    ),
    "a long number": lambda made: entry(made, '{"schema": ' + "9" * 10_000 + "}"),
    "another form": lambda made: entry(made, '{"name": "bad"}'),
    "of the future": lambda made: changed(made, lambda lineage: lineage.update(schema=99)),
    "NaN": lambda made: changed(made, lambda lineage: lineage["recipe"].update(x=float("nan"))),
    "more than a number holds": lambda made: entry(
        made, json.dumps(made.lineage()).replace('"ratio": 0.35', '"ratio": 1e999')
    ),
    "half a character": lambda made: changed(made, lambda lineage: lineage["recipe"].update(x="\ud800")),
    "no files": lambda made: changed(made, lambda lineage: lineage.pop("files")),
    "a cycle": lambda made: changed(made, descends_from_itself),
    "a folder": lambda made: not_a_file(made, lambda path: path.mkdir()),
    "a pipe": lambda made: not_a_file(made, os.mkfifo),
    "a link to a device": lambda made: not_a_file(made, lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": lambda made: not_a_file(made, lambda path: path.symlink_to("lineage.json")),
    "a link to another's": lambda made: not_a_file(
        made, lambda path: path.symlink_to(made.folder / "lineage.json")
    ),
}


def descends_from_itself(lineage: dict[str, Any]) -> None:
    key, stage = next((key, each) for key, each in lineage["stages"].items() if each["stage"] == "save")
    stage["inputs"]["model"] = {"digest": stage["digest"], "stage": "save", "key": key}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_entry_is_a_line_and_the_others_are_audited(tiny: Publication, what: str) -> None:
    BAD[what](tiny)
    assert verdicts(tiny) == {"bad": "wrong", "other": "verified", "tiny": "verified"}


def test_a_model_without_lineage_is_named_and_what_is_no_model_is_left_alone(tiny: Publication) -> None:
    published = tiny.root / "published"
    (published / "bad").mkdir()
    shutil.copy(tiny.folder / "model.safetensors", published / "bad")
    (published / "notes").mkdir()
    (published / "loop").symlink_to("loop")
    os.mkfifo(published / "pipe")
    assert verdicts(tiny) == {"bad": "unverifiable", "other": "verified", "tiny": "verified"}


@pytest.mark.parametrize("gone", ["lineage.json", "."])
def test_what_the_store_published_is_missed_where_its_lineage_is_gone(tiny: Publication, gone: str) -> None:
    if gone == ".":
        for path in tiny.folder.iterdir():
            path.unlink()
    else:
        (tiny.folder / gone).unlink()
    assert verdicts(tiny) == {"other": "verified", "tiny": "wrong"}


def test_a_bad_record_in_the_store_ends_nothing(tiny: Publication) -> None:
    [made, *_] = tiny.store.all("publish")
    records = [made.path / "manifest.json", *(tiny.store.root / ".published").iterdir()]
    kept = {path: path.read_bytes() for path in records}
    try:
        for path in records:
            path.chmod(0o644)
            path.write_text('{"digest": NaN, "folder": "\\ud800"}')
        assert "tiny" in verdicts(tiny)
    finally:
        for path, content in kept.items():
            path.write_bytes(content)


def test_publishing_sees_a_damaged_folder_and_does_not_end_with_it(tiny: Publication) -> None:
    made = list(tiny.store.all("publish"))
    assert [still_holds(each) for each in made] == [True, True]
    os.mkfifo(tiny.folder / "pipe")
    (tiny.other / "lineage.json").write_text('{"files": NaN}')
    assert [still_holds(each) for each in made] == [False, False]


def forged_source(made: Publication, path: str, files: dict[str, str]) -> Finding:
    """What is said of a source that a stranger's lineage names, in a project that never read it."""
    lineage = made.lineage()
    digest = digest_json(files)
    lineage["sources"] = {digest: {"name": "file", "digest": digest, "path": path, "files": files}}
    body = {name: value for name, value in lineage.items() if name != "digest"}
    (made.folder / "lineage.json").write_text(json.dumps({**body, "digest": digest_json(body)}))
    [sources] = [
        part for part in audit(made.folder, Store(made.root / "none")).parts if part.name == "sources"
    ]
    return sources.parts[0]


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "../secret", "/dev/zero", "~/.ssh/id", ".env", "/proc/self/environ", "huge"]
)
def test_a_place_that_a_stranger_names_is_not_looked_at(tiny: Publication, tmp_path: Path, path: str) -> None:
    (tiny.root / ".env").write_text("secret")
    (tiny.root / "huge").touch()
    os.truncate(tiny.root / "huge", 200 << 30)  # would be read for minutes
    found = forged_source(tiny, path, {Path(path).name: "0" * 64})
    assert (found.verdict, found.reason) == ("unverifiable", "not looked at")
    assert "--sources" in found.detail


def test_a_source_outside_is_verified_where_this_project_read_it_or_on_demand(
    tiny: Publication, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert audit(tiny.folder, tiny.store).overall == "verified", (
        "its absolute path is in the store's own lineage"
    )
    nothing = Store(tmp_path / "none")
    assert {part.reason for part in audit(tiny.folder, nothing).all_of("unverifiable")} == {
        "absent",
        "not looked at",
    }
    everywhere = audit(tiny.folder, nothing, everywhere=True)
    assert {part.reason for part in everywhere.all_of("unverifiable")} == {"absent"}


def test_a_pipe_or_a_folder_in_a_sources_place_is_not_opened(tiny: Publication) -> None:
    os.mkfifo(tiny.root / "pipe")
    try:
        assert forged_source(tiny, "pipe", {"pipe": "0" * 64}).verdict == "unverifiable"
    finally:
        (tiny.root / "pipe").unlink()
    assert forged_source(tiny, "store", {"publish": "0" * 64}).verdict == "unverifiable"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a//b", ".", "", "a\nb", "x\x1b[2J", "a\u202eb"])
def test_a_name_that_leaves_the_folder_or_steers_a_terminal_is_refused(tiny: Publication, name: str) -> None:
    lineage = tiny.lineage()
    lineage["files"][name] = "0" * 64
    (tiny.folder / "lineage.json").write_text(json.dumps(lineage))
    with pytest.raises(CameraError, match="is no lineage of this pipeline: files"):
        read_lineage(tiny.folder / "lineage.json")


@pytest.mark.parametrize("name", ["模型 (final) [v2].json", "a b.txt", "..x", "sub/x.json", "ü#?.md"])
def test_an_honest_name_is_not(tiny: Publication, name: str) -> None:
    lineage = tiny.lineage()
    lineage["files"][name] = "0" * 64
    (tiny.folder / "lineage.json").write_text(json.dumps(lineage))
    assert read_lineage(tiny.folder / "lineage.json") == lineage


def test_files_linked_into_dvcs_cache_are_files(tiny: Publication) -> None:
    """As `dvc config cache.type symlink` has them; other links are not followed."""
    weights = tiny.folder / "model.safetensors"
    (tiny.root / ".dvc" / "cache" / "files").mkdir(parents=True)
    (tiny.root / ".dvc" / "config").write_text("")
    try:
        kept = tiny.root / ".dvc" / "cache" / "files" / "x"
        weights.rename(kept)
        weights.symlink_to(kept)
        assert audit(tiny.folder, tiny.store).overall == "verified"
    finally:
        shutil.rmtree(tiny.root / ".dvc")


def test_no_lease_or_lock_is_left_beside_what_was_audited(tiny: Publication) -> None:
    before = sorted(tiny.folder.parent.iterdir())
    audit(tiny.folder, tiny.store)
    assert sorted(tiny.folder.parent.iterdir()) == before
    assert not signature_of(tiny.folder).exists()
    assert digest_file(tiny.folder / "lineage.json") == digest_file(
        tiny.root / "kept" / "tiny" / "lineage.json"
    )
    assert read_json(tiny.folder / "lineage.json")["schema"] == 3
