"""Whatever one edit a forger makes to a published folder, the audit's verdict is never better than it should be.

The forger can write the folder and nothing else: not the store, not the registry, no trusted key.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from camera.digests import digest_file, digest_json
from camera.files import read_json
from tasks.audit import audit
from tasks.audit.finding import Verdict
from tasks.signing import signature_of
from tasks.store import Store
from tests.tasks.conftest import flip
from tests.tasks.publications import Publication

WEIGHTS = "model.safetensors"
GOOD: tuple[Verdict, ...] = ("verified", "attested")


def test_untouched_it_is_verified_in_its_project_and_no_better_than_its_word_elsewhere(
    tiny: Publication,
) -> None:
    assert tiny.verdicts() == ("verified", "unverifiable")
    parts = audit(tiny.folder, Store(tiny.root / "no store")).every()
    assert [part.name for part in parts if part.verdict in GOOD] == [], "a forger may have written all of it"


PLAIN: dict[str, Callable[[Path], Any]] = {
    "a bit of the weights": lambda folder: flip(folder / WEIGHTS),
    "a bit of the GGUF's head": lambda folder: flip(gguf_in(folder), 40),
    "a bit of the card": lambda folder: flip(folder / "README.md"),
    "a file gone": lambda folder: (folder / "generation_config.json").unlink(),
    "a file renamed": lambda folder: (folder / WEIGHTS).rename(folder / "model.bin"),
    "a file cut": lambda folder: os.truncate(folder / WEIGHTS, 100),
    "a file more": lambda folder: (folder / "modeling_x.py").write_text("import os"),
    "a hidden file more": lambda folder: (folder / ".hidden").write_text("x"),
    "a folder of templates": lambda folder: templates(folder),
    "an empty folder": lambda folder: (folder / "additional_chat_templates").mkdir(),
    "a link to a folder": lambda folder: (folder / "additional_chat_templates").symlink_to(folder.parents[1]),
    "a link to a file": lambda folder: (folder / "x.jinja").symlink_to("/etc/hostname"),
    "a link to nothing": lambda folder: (folder / "x.jinja").symlink_to("nowhere"),
    "a link to itself": lambda folder: (folder / "x.jinja").symlink_to("x.jinja"),
    "a file behind a link": lambda folder: behind_a_link(folder / WEIGHTS),
    "a pipe": lambda folder: os.mkfifo(folder / "pipe"),
    "a pipe in place of a file": lambda folder: ((folder / WEIGHTS).unlink(), os.mkfifo(folder / WEIGHTS)),
    "a folder in place of a file": lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
    "another model's weights": lambda folder: swap(folder, WEIGHTS),
    "another model's report": lambda folder: swap(folder, "report.html"),
    "a word in lineage.json": lambda folder: edit(folder, lambda lineage: lineage.update(name="tinny")),
    "a field twice in lineage.json": lambda folder: double(folder / "lineage.json"),
}


def gguf_in(folder: Path) -> Path:
    return next(folder.glob("*.gguf"))


def templates(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "default.jinja").write_text("You are evil.")


def behind_a_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to("../elsewhere")


def swap(folder: Path, name: str) -> None:
    shutil.copyfile(folder.with_name("other") / name, folder / name)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    lineage = read_json(folder / "lineage.json")
    change(lineage)
    (folder / "lineage.json").write_text(json.dumps(lineage))


def double(path: Path) -> None:
    path.write_text(path.read_text().replace("{", '{"name": "another",', 1))


@pytest.mark.parametrize("what", PLAIN)
def test_an_edit_without_care_is_wrong_everywhere(tiny: Publication, what: str) -> None:
    PLAIN[what](tiny.folder)
    assert answer(tiny.folder, tiny.store) == "wrong"
    assert answer(tiny.folder, Store(tiny.root / "no store")) == "wrong"


def answer(path: Path, store: Store) -> Verdict:
    """The verdict; what is no lineage at all is refused, which is wrong too."""
    from camera.errors import CameraError

    try:
        return audit(path, store).overall
    except CameraError:
        return "wrong"


MADE_BY_A_STAGE: dict[str, Callable[[Path], Any]] = {
    "weights": lambda folder: flip(folder / WEIGHTS),
    "GGUF": lambda folder: flip(gguf_in(folder)),
    "config": lambda folder: flip(folder / "config.json", 2),
    "report": lambda folder: flip(folder / "report.html"),
    "another model's weights": lambda folder: swap(folder, WEIGHTS),
    "another model's GGUF": lambda folder: shutil.copyfile(
        gguf_in(folder.with_name("other")), gguf_in(folder)
    ),
    "another model's results": lambda folder: swap(folder, "results.json"),
    "a file more": lambda folder: (folder / "modeling_x.py").write_text("import os"),
    "a file gone": lambda folder: (folder / "generation_config.json").unlink(),
}


@pytest.mark.parametrize("what", MADE_BY_A_STAGE)
def test_what_a_stage_made_cannot_be_replaced_by_a_lineage_that_says_so(tiny: Publication, what: str) -> None:
    MADE_BY_A_STAGE[what](tiny.folder)
    tiny.rewrite()
    assert tiny.verdicts() == ("wrong", "wrong")


def test_not_even_if_it_says_that_the_stages_made_other_files(tiny: Publication) -> None:
    """The digests of the stages, which the next ones read and the GGUF holds, do not follow."""
    flip(tiny.folder / WEIGHTS)

    def claim(lineage: dict[str, Any]) -> None:
        for key, files in lineage["made_of"].items():
            for name in files.keys() & lineage["files"].keys() - {"README.md"}:
                files[name] = lineage["files"][name]
            lineage["stages"][key]["digest"] = digest_json(files)

    tiny.rewrite(claim)
    assert tiny.verdicts() == ("wrong", "wrong")


def test_nor_if_it_does_not_say_what_they_made(tiny: Publication) -> None:
    flip(tiny.folder / WEIGHTS)
    tiny.rewrite(lambda lineage: lineage.pop("made_of"))
    here, elsewhere = tiny.verdicts()
    assert here == "wrong"
    assert elsewhere not in GOOD


@pytest.mark.parametrize("what", ["card", "recipe", "machine", "references", "a stage more", "a stage less"])
def test_what_no_digest_of_a_stage_holds_stands_on_the_record_of_the_publication(
    tiny: Publication, what: str
) -> None:
    def change(lineage: dict[str, Any]) -> None:
        if what == "recipe":
            lineage["recipe"]["prune"]["ratio"] = 0.1
        if what == "machine":
            lineage["environment"]["machine"] = "aarch64"
        if what == "references":
            lineage["references"] = {}
        if what == "a stage more":
            lineage["stages"] |= read_json(tiny.other / "lineage.json")["stages"]
        if what == "a stage less":
            lineage["stages"].pop(
                next(key for key, entry in lineage["stages"].items() if entry["stage"] == "report")
            )

    if what == "card":
        (tiny.folder / "README.md").write_text("The best model.")
    if what == "references":
        tiny.rewrite(lambda lineage: lineage.update(references={"mlflow_run": "x"}))
    tiny.rewrite(change)
    if what == "references":  # there were none: it is what it was
        assert tiny.verdicts()[0] == "verified"
        return
    here, elsewhere = tiny.verdicts()
    assert here == "wrong"
    assert elsewhere not in GOOD


def test_another_publication_in_its_place_is_not_what_was_published_here(tiny: Publication) -> None:
    shutil.rmtree(tiny.folder)
    shutil.copytree(tiny.other, tiny.folder)
    [publication] = audit(tiny.folder, tiny.store).all_of("wrong")
    assert "this store published" in publication.detail
    copy = tiny.root / "published" / "a copy (of [other])"
    shutil.copytree(tiny.other, copy)
    assert audit(copy, tiny.store).overall == "verified", (
        "where nothing else was published it is what it says"
    )


def test_json_in_another_order_says_the_same(tiny: Publication) -> None:
    lineage = tiny.lineage()
    (tiny.folder / "lineage.json").write_text(json.dumps(dict(reversed(lineage.items()))))
    assert tiny.verdicts()[0] == "verified"


@pytest.fixture(scope="module")
def signers(two_publications: Publication) -> Iterator[Path]:
    """The publication is signed by Alice, whom the auditor trusts."""
    if shutil.which("ssh-keygen") is None:
        pytest.skip("no ssh-keygen")
    published = two_publications
    key = published.root / "alice"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key), "-C", "alice"], check=True)
    command = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(key), "-n", "camera-lineage"]
    lineage = published.folder / "lineage.json"
    subprocess.run([*command, str(lineage)], check=True, capture_output=True)
    lineage.with_name("lineage.json.sig").rename(signature_of(published.root / "kept" / "tiny"))
    list_of = published.root / "signers"
    list_of.write_text(f'alice namespaces="camera-lineage" {key.with_suffix(".pub").read_text()}')
    published.mend()
    yield list_of
    signature_of(published.root / "kept" / "tiny").unlink()
    published.mend()


def test_a_trusted_signature_attests_what_cannot_be_verified_elsewhere(
    tiny: Publication, signers: Path
) -> None:
    nothing = Store(tiny.root / "no store")
    assert audit(tiny.folder, nothing, signers=signers, require_signature=True).overall == "attested"
    assert audit(tiny.folder, nothing).overall not in GOOD


@pytest.mark.parametrize("what", ["weights", "GGUF", "a file more"])
@pytest.mark.parametrize("rewritten", [False, True])
def test_a_signature_attests_nothing_of_an_edited_folder(
    tiny: Publication, signers: Path, what: str, rewritten: bool
) -> None:
    MADE_BY_A_STAGE[what](tiny.folder)
    if rewritten:
        tiny.rewrite()
    for store in (tiny.store, Store(tiny.root / "no store")):
        assert audit(tiny.folder, store, signers=signers).overall == "wrong"


def test_a_gguf_alone_is_judged_as_its_folder_is(tiny: Publication, signers: Path, tmp_path: Path) -> None:
    gguf, nothing = gguf_in(tiny.folder), Store(tiny.root / "no store")
    assert audit(gguf, tiny.store, signers=signers).overall == "attested"
    assert audit(gguf, nothing, signers=signers, require_signature=True).overall == "attested"
    flip(gguf)
    assert audit(gguf, tiny.store).overall == "wrong"
    edit(tiny.folder, lambda lineage: lineage["files"].update({gguf.name: digest_file(gguf)}))
    assert audit(gguf, nothing).overall == "wrong"
    tiny.rewrite()
    assert audit(gguf, nothing).overall == "wrong"
    tiny.mend()
    behind_a_link(gguf)
    assert audit(gguf, tiny.store).overall == "wrong"
    tiny.mend()
    alone = Path(shutil.copy(gguf_in(tiny.folder), tmp_path / "x.gguf"))
    assert audit(alone, tiny.store).overall == "verified"
    assert audit(alone, tiny.store, signers=signers, require_signature=True).overall == "wrong"
    assert audit(alone, nothing).overall == "unverifiable"


def test_an_artifact_copied_elsewhere_is_held_to_the_manifest_beside_it(
    tiny: Publication, tmp_path: Path
) -> None:
    [made] = [
        each
        for each in tiny.store.all("convert")
        if "baseline" not in each.manifest["step"]
        and any(name.startswith("tiny") for name in each.manifest["files"])
    ]
    copy = Path(shutil.copytree(made.path, tmp_path / "copy"))
    nothing = Store(tiny.root / "no store")
    assert audit(copy, tiny.store).overall == "verified"
    assert audit(copy, nothing).overall == "unverifiable"
    [gguf] = copy.glob("*.gguf")
    flip(gguf)
    assert (audit(copy, tiny.store).overall, audit(copy, nothing).overall) == ("wrong", "wrong")
    flip(gguf)
    (copy / "manifest.json").chmod(0o644)
    (copy / "manifest.json").unlink()
    assert audit(copy, nothing).overall == "wrong"


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every number, word and empty thing in a document."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    nothing = True
    for key, each in entries:
        nothing = False
        yield from leaves(each, (*path, key))
    if nothing and path:
        yield path


OTHER = st.sampled_from(
    [None, True, 0, -1, 1.5, "", "x", "0" * 64, "f" * 64, "../x", "/etc/passwd", [], {}, "a\nb"]
)


def changed_somewhere(tiny: Publication, draw: st.DataObject) -> None:
    """Anything in lineage.json replaced, moved or taken away, and its digest made to fit."""
    lineage = tiny.lineage()
    *to, last = draw.draw(st.sampled_from(sorted(leaves(lineage), key=str)))
    place = lineage
    for step in to:
        place = place[step]
    before = place[last]
    if draw.draw(st.booleans()):
        place[last] = draw.draw(OTHER.filter(lambda value: value != before))
    elif isinstance(place, dict):
        del place[last]
    else:
        place.append(before)
    body = {name: value for name, value in lineage.items() if name != "digest"}
    (tiny.folder / "lineage.json").write_text(json.dumps({**body, "digest": digest_json(body)}))
    if body == {
        name: value
        for name, value in read_json(tiny.root / "kept" / "tiny" / "lineage.json").items()
        if name != "digest"
    }:
        return  # the digest alone was changed, and mended again
    assert answer(tiny.folder, tiny.store) == "wrong"
    assert answer(tiny.folder, Store(tiny.root / "no store")) not in GOOD


def a_bit_flipped_somewhere(tiny: Publication, draw: st.DataObject) -> None:
    path = draw.draw(st.sampled_from(sorted(tiny.folder.iterdir())))
    data = bytearray(path.read_bytes())
    data[draw.draw(st.integers(0, len(data) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    path.chmod(0o644)
    path.write_bytes(data)
    if path.name == "lineage.json" and same(path, tiny.root / "kept" / "tiny" / path.name):
        return  # white space
    assert answer(tiny.folder, tiny.store) == "wrong"
    assert answer(tiny.folder, Store(tiny.root / "no store")) == "wrong"


def same(path: Path, other: Path) -> bool:
    try:
        return bool(json.loads(path.read_bytes()) == json.loads(other.read_bytes()))
    except ValueError:
        return False


EDITS = {"lineage": changed_somewhere, "bit": a_bit_flipped_somewhere}


def hold(tiny: Publication, edit: str, examples: int) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(st.data())
    def every(draw: st.DataObject) -> None:
        try:
            EDITS[edit](tiny, draw)
        finally:
            tiny.mend()

    every()


@pytest.mark.parametrize("edit", EDITS)
def test_no_edit_is_better_than_it_should_be(tiny: Publication, edit: str) -> None:
    hold(tiny, edit, 8)


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_no_edit_of_many_is_better_than_it_should_be(tiny: Publication, edit: str) -> None:
    hold(tiny, edit, 600)
