"""Two publications of one project, made once, and a copy to mend them with: for tests that damage and forge them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camera.digests import digest_file, digest_json
from camera.files import read_json
from tasks.audit import audit
from tasks.audit.finding import Verdict
from tasks.pipeline import build_pipeline
from tasks.project import Project
from tasks.recipe import check_recipe
from tasks.run import run_pipeline
from tasks.sources import find_sources
from tasks.stage import Request, find, perform
from tasks.store import Artifact, Store
from tests.tasks.conftest import WORDS, Quiet
from tests.tiny import tiny_checkpoint


@dataclass(frozen=True)
class Publication:
    """Where they are."""

    root: Path
    store: Store

    @property
    def folder(self) -> Path:
        return self.root / "published" / "tiny"

    @property
    def other(self) -> Path:
        return self.root / "published" / "other"

    def publish(self, name: str = "tiny", ratio: float = 0.35, model: str = "model") -> None:
        """Run a recipe of the project; what the store holds is not made again."""
        text = {"name": "file", "path": str(self.root / "story.txt")}
        content = {
            "name": name,
            "model": str(self.root / model),
            "calibration": {**text, "samples": 2, "length": 16},
            "capture": {"batch_size": 2, "device": "cpu"},
            "prune": {"ratio": ratio},
            "evaluate": {"datasets": [text], "window": 32, "max_windows": 1, "device": "cpu"},
            "benchmark": {"decode": [1], "repeats": 1, "device": "cpu"},
            "tracking": {"enabled": False},
            "publish": {"folder": str(self.root / "published"), "dvc": False},
        }

        def performed(request: Request) -> tuple[Artifact, bool]:
            return perform(self.store, request), find(self.store, request) is not None

        recipe = check_recipe(content, "test")
        pipeline = build_pipeline(recipe, find_sources(recipe))
        run_pipeline(pipeline, performed, Project(self.root / "home"), Quiet())

    def mend(self) -> None:
        shutil.rmtree(self.root / "published")
        shutil.copytree(self.root / "kept", self.root / "published")

    def lineage(self) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.folder / "lineage.json")
        return found

    def rewrite(self, change: Callable[[dict[str, Any]], Any] = lambda lineage: None) -> None:
        """Change lineage.json, and make its files and its own digest fit again."""
        lineage = self.lineage()
        names = [
            path.name for path in self.folder.iterdir() if path.is_file() and path.name != "lineage.json"
        ]
        lineage["files"] = {name: digest_file(self.folder / name) for name in sorted(names)}
        change(lineage)
        body = {name: value for name, value in lineage.items() if name != "digest"}
        (self.folder / "lineage.json").write_text(json.dumps({**body, "digest": digest_json(body)}))

    def verdicts(self) -> tuple[Verdict, Verdict]:
        """In its own project, and where nothing but the folder is known."""
        elsewhere = audit(self.folder, Store(self.root / "no store"))
        return audit(self.folder, self.store).overall, elsewhere.overall


def publish_two(root: Path) -> Publication:
    """`tiny` and `other`, of one model; neither MLflow nor DVC knows of them."""
    (root / "story.txt").write_text("".join(f"{number}. {WORDS}" for number in range(60)))
    tiny_checkpoint(root / "model", "PanguEmbedded")
    made = Publication(root, Store(root / "store"))
    made.publish("tiny", 0.35)
    made.publish("other", 0.8)
    shutil.copytree(root / "published", root / "kept")
    return made
