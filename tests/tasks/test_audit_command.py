"""What `camera audit` does with its options: what is wrong is said as a tree, and the project's own list of signers counts."""

from pathlib import Path
from typing import Any

import pytest
import typer

from camera.errors import CameraError
from flows.commands import inspecting
from flows.commands.auditing import audited, exit_code
from tasks.audit.finding import Finding
from tasks.project import Project
from tests.tasks.conftest import flip
from tests.tasks.publications import Publication


def rebuilt(made: Publication, model: Path | None) -> list[Finding]:
    how: dict[str, Any] = {"from_remote": False, "signers": None, "signed": False}
    published, named = made.root / "published", None if model is None else str(model)
    return audited(named, published, made.root / "home", made.store, rebuild=True, **how)


def test_what_is_wrong_is_not_rebuilt_and_is_told_with_its_tree(tiny: Publication) -> None:
    flip(tiny.folder / "README.md")
    assert exit_code(rebuilt(tiny, tiny.folder)) == 1
    tiny.mend()
    tiny.rewrite(lambda lineage: lineage["recipe"].update(name="another's"))
    found = rebuilt(tiny, tiny.folder)
    assert exit_code(found) == 1
    assert "publication" in {part.name for part in found[0].every()}
    assert not any("rebuilt" in part.name for part in found[0].every())
    (tiny.folder / "lineage.json").write_text('{"digest": 1}')
    assert exit_code(rebuilt(tiny, tiny.folder)) == 1


def test_what_holds_no_recipe_is_not_rebuilt_and_its_audit_is_told_all_the_same(tiny: Publication) -> None:
    [gguf] = tiny.folder.glob("*.gguf")
    [found] = rebuilt(tiny, gguf)
    assert found.overall == "unverifiable"
    assert [part.name for part in found.all_of("unverifiable")] == ["rebuilt from nothing"]


def test_the_projects_own_list_says_whose_signature_is_required(
    tiny: Publication, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspecting, "here", lambda: Project(tiny.root))  # of this directory
    how: dict[str, Any] = {"everything": False, "published": Path("published"), "rebuild": False}
    how |= {"remote": False, "sources": False, "strict": False, "as_json": False}
    required: dict[str, Any] = {"signers": None, "require_signature": True, **how}
    with pytest.raises(CameraError, match="nobody is named whose counts"):
        inspecting.audit(str(tiny.folder), **required)
    ours = tiny.root / "allowed_signers"
    ours.write_text(
        "alice ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ0sHkl1c1yS0ClbJEqsDLwy9EL2kz8tdGM5y3pXq1zN\n"
    )
    try:
        with pytest.raises(typer.Exit) as ended:
            inspecting.audit(str(tiny.folder), **required)
    finally:
        ours.unlink()
    assert ended.value.exit_code == 1
    assert "there is no tiny.lineage.json.sig" in capsys.readouterr().out
