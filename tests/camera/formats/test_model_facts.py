from pathlib import Path

import gguf

from camera.files import write_json
from camera.formats.gguf_reader import open_gguf
from camera.formats.model_facts import model_facts

CARD = """---
license: apache-2.0
language: [en, zh]
base_model: someone/Some-Model-1B
datasets: [someone/text]
tags: [chat]
model_name: not carried
---
# Some model
"""


def written(folder: Path) -> dict[str, object]:
    path = folder / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    facts = model_facts(folder)
    facts.name = "ours"
    facts.set_gguf_meta_model(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    found = open_gguf(path).metadata
    return {key.removeprefix("general."): value for key, value in found.items() if key.startswith("general.")}


def test_the_card_s_facts_and_how_to_sample_are_carried(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    sampling = {"top_k": 0, "top_p": 0.75, "temperature": 1, "repetition_penalty": 1.5, "do_sample": True}
    write_json(tmp_path / "generation_config.json", sampling)
    found = written(tmp_path)
    assert (found["name"], found["license"], found["languages"]) == ("ours", "apache-2.0", ["en", "zh"])
    assert found["base_model.0.repo_url"].endswith("/someone/Some-Model-1B")
    assert (found["base_model.count"], found["dataset.count"], found["tags"]) == (1, 1, ["chat"])
    assert {key: value for key, value in found.items() if key.startswith("sampling")} == {
        "sampling.top_k": 0,
        "sampling.top_p": 0.75,
        "sampling.temp": 1.0,
        "sampling.penalty_repeat": 1.5,
    }


def test_a_card_that_cannot_be_read_leaves_its_facts_out(tmp_path: Path) -> None:
    for text in ("---\nlicense: [\n---\n", "---\n- 1\n---\n", "no front matter"):
        (tmp_path / "README.md").write_text(text)
        assert written(tmp_path)["name"] == "ours"
    (tmp_path / "README.md").write_text("---\nlicense: 3\nlanguage: [{}, 7]\n---\n")
    assert (written(tmp_path)["license"], written(tmp_path)["languages"]) == ("3", ["7"])
