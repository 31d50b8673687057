"""The model card."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from camera.api import prune
from camera.checkpoints.checkpoint import Checkpoint
from camera.options import CalibrationOptions, PruneOptions
from camera.report.card import CardFacts, render_card, source_license, write_card
from camera.report.table import results_markdown
from tests.camera.report.conftest import Run
from tests.tiny import tiny_checkpoint

PRUNED = {
    "mode": "physical",
    "ratio": 0.2,
    "method": "camera",
    "sparsity": 0.0,
    "width": 192,
    "kept_width": 160,
    "removed_share": 1 / 6,
}


def _facts(**changes: Any) -> CardFacts:
    given = {"name": "tiny-camera", "base_model": "someone/tiny", "model_type": "llama", "prune": PRUNED}
    return CardFacts(**{**given, **changes})


def _front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card[4:].split("\n---\n", 1)[0])


def test_the_front_matter_is_what_the_hub_reads() -> None:
    assert _front_matter(render_card(_facts(license="apache-2.0"))) == {
        "base_model": "someone/tiny",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "camera", "ascend"],
    }


def test_a_hostile_licence_stays_a_value() -> None:
    hostile = "mit\n---\ntags: [x]"
    assert _front_matter(render_card(_facts(license="a: b # c")))["license"] == "a: b # c"
    assert _front_matter(render_card(_facts(license_name=hostile)))["license_name"] == hostile


def test_a_folder_is_no_base_model_for_the_hub_and_its_path_stays_here() -> None:
    card = render_card(_facts(base_model="/somewhere/secret/tiny"))
    assert "base_model" not in _front_matter(card)
    assert "secret" not in card
    assert "tiny with 16.7 %" in card


def test_a_card_without_results_says_that_quality_is_unknown() -> None:
    card = render_card(_facts())
    assert "has not been measured" in card
    assert "## Results" not in card


def test_a_card_says_what_was_done_besides_removing_channels() -> None:
    decided = {"refitted": True, "zero_shares": {"gate": 0.25, "up": 0.25, "down": 0.25}}
    decisions = [decided, decided, {**decided, "refitted": False}]
    used = {"method": "obs", "sparsity": 0.25, "decisions": decisions}
    card = render_card(_facts(prune={**PRUNED, "layers": 3, **used}))
    plain = render_card(_facts())
    for words in ("Optimal Brain Surgeon", "2 of 3 layers were refitted", "25.0 % are zero"):
        assert words in card
        assert words not in plain


def test_a_card_says_what_became_of_experts() -> None:
    splits = [
        {"experts_kept": 6, "kept": 80, "loss": 0.125},
        {"experts_kept": 8, "kept": 64, "loss": 0.25},
    ]
    experts = {
        "scope": "expert",
        "experts": 8,
        "experts_kept": 6,
        "ranked_by_weights": {"1": {"experts.3": 2, "experts.5": 0}},
        "considered": splits,
        "config": {"moe_intermediate_size": 80, "num_experts": 6},
        "width": 96,
        "kept_width": 80,
        "decisions": [{"refitted": True}, {"refitted": False}],
    }
    card = " ".join(render_card(_facts(prune={**PRUNED, **experts})).split())
    for words in (
        "Of the 8 experts of each layer, the 2 that put out the least energy",
        "In every expert that stays",
        "80 of 96 stay, each expert's own choice",
        "among 2 ways to reach 20.0 %",
        "6 × 80 (0.1250), 8 × 64 (0.2500).",
        "`moe_intermediate_size` is 80, `num_experts` is 6.",
        "2 networks saw too few calibration tokens",
        "1 of 2 networks were refitted",
    ):
        assert words in card
    assert "channels wide" not in card


def test_a_card_of_a_joint_ranking_says_that_nothing_is_smaller() -> None:
    joint = {"mode": "mask", "scope": "layer", "experts": 8, "experts_kept": 8, "ranked_by_weights": {}}
    card = " ".join(render_card(_facts(prune={**PRUNED, **joint, "config": {}})).split())
    assert "All 8 experts of each layer stay." in card
    assert "all channels of a layer ranked together: on average 160 of 192 keep their weights" in card
    assert "the file is no smaller" in card


def test_a_card_with_results_holds_the_table(run: Run) -> None:
    results = run.results()
    card = render_card(_facts(), results)
    assert results_markdown(results) in card
    assert "report.html" in card


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "physical"}, "160 channels wide instead of 192"),
        ({"mode": "mask"}, "the file is no smaller"),
        ({"kept_width": 192, "removed_share": 0}, "asked to remove none"),
    ],
)
def test_the_card_says_what_was_done(changes: dict[str, Any], words: str) -> None:
    assert words in render_card(_facts(prune={**PRUNED, **changes}))


def test_the_code_of_the_card_loads_openpangu(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "pangu", "PanguEmbedded")
    card = render_card(_facts(model_type="PanguEmbedded"))
    code = (
        card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "pangu"))
    )
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert type(scope["model"]).__name__ == "PanguEmbeddedForCausalLM"
    assert scope["tokenizer"]("The old lighthouse")["input_ids"]


def test_the_code_of_the_card_loads_a_pruned_llama(run: Run) -> None:
    code = render_card(_facts()).split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(run.folders["saved"])), scope)
    assert scope["model"].config.intermediate_size == 144


def test_remote_code_is_mentioned_only_where_the_folder_has_it() -> None:
    assert "trust_remote_code" in render_card(_facts(remote_code=True))
    assert "trust_remote_code" not in render_card(_facts())


def test_a_published_folder_says_which_engine_reads_which_file(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    shutil.copytree(run.folders["saved"], folder)
    for path in run.gguf.iterdir():
        shutil.copyfile(path, folder / path.name)
    write_card(folder, Checkpoint.open(folder), run.folders["pruned"], base_model="someone/tiny")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "gguf" in _front_matter(card)["tags"]
    lines = card.splitlines()
    ours = next(line for line in lines if line.startswith("| tiny-q4\\_0\\_64.gguf"))
    twin = next(line for line in lines if line.startswith("| tiny-q4\\_0-twin.gguf"))
    assert "only a llama.cpp that defines" in ours
    assert "any recent llama.cpp" in twin
    assert "Do not give a Q4" in card


def test_without_q4_0_64_there_is_no_warning() -> None:
    card = render_card(_facts(gguf=({"file": "tiny-q4_0.gguf", "type": "q4_0"},)))
    assert "any recent llama.cpp" in card
    assert "Do not give" not in card


def test_the_licence_comes_from_the_source_and_outlives_a_second_card(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(run.folders["saved"], folder)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: openpangu\n---\nold text\n")
    for _ in range(2):
        write_card(
            folder, Checkpoint.open(folder), run.folders["pruned"], base_model="someone/tiny", name="x"
        )
    card = (folder / "README.md").read_text(encoding="utf-8")
    front = _front_matter(card)
    assert (front["license"], front["license_name"]) == ("other", "openpangu")
    assert "old text" not in card


@pytest.mark.parametrize(
    "text", ["no front matter", "---\n[broken\n---\n", "---\n- a list\n---\n", "---\nhalf"]
)
def test_a_readme_without_a_licence_gives_none(tmp_path: Path, text: str) -> None:
    assert source_license(tmp_path) == {}
    (tmp_path / "README.md").write_text(text)
    assert source_license(tmp_path) == {}


def test_equal_facts_give_equal_cards(run: Run) -> None:
    assert render_card(_facts(), run.results()) == render_card(_facts(), run.results())


def test_markdown_in_a_name_is_text() -> None:
    assert "\\<script\\>" in render_card(_facts(name="<script>"))


def test_a_card_names_lineage_only_where_it_lies(tmp_path: Path) -> None:
    assert "(lineage.json)" in render_card(_facts(lineage=True))
    assert "lineage.json" not in render_card(_facts())


def test_every_file_that_the_card_of_camera_prune_links_to_is_there(tmp_path: Path) -> None:
    model, text = tiny_checkpoint(tmp_path / "model", "qwen2"), tmp_path / "text.txt"
    text.write_text("The keeper climbed the narrow stairs each evening. " * 200)
    calibration = CalibrationOptions(name="file", path=text, samples=2, length=32)
    prune(model, tmp_path / "out", PruneOptions(ratio=0.4), calibration=calibration)
    linked = re.findall(r"\]\(([^)#:]+)\)", (tmp_path / "out" / "README.md").read_text())
    assert [name for name in linked if not (tmp_path / "out" / name).exists()] == []


def test_a_card_of_what_transformers_lacks_says_what_vllm_needs() -> None:
    assert "`--trust-remote-code`" in render_card(_facts(model_type="PanguEmbedded"))
    assert "`--trust-remote-code`" not in render_card(_facts(model_type="llama"))
