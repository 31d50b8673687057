import json
from pathlib import Path

import pytest

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.formats.chat_templates import chat_templates
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.camera.formats.tokenizer_keys import keys
from tests.tiny import tiny_checkpoint


def test_a_template_is_found_without_a_tokenizer_config(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "qwen2")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}!")
    assert keys(tmp_path)[0]["tokenizer.chat_template"] == "{{ messages }}!"


@pytest.mark.parametrize("named", [{"rag": "r", "default": "d"}, [{"name": "default", "template": "d"}]])
def test_templates_may_stand_in_a_json_file_with_or_without_names(tmp_path: Path, named: object) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    assert chat_templates(tmp_path, {})["default"] == "d"
    assert chat_templates(tmp_path, {"chat_template": "c"})["default"] == "c"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": [1]}))
    with pytest.raises(CameraError, match=r"chat_template\.json"):
        chat_templates(tmp_path, {})


def test_additional_templates_come_into_the_file_by_way_of_the_packed_folder(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    (model / "chat_template.jinja").write_text("main")
    (model / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag"):
        (model / "additional_chat_templates" / f"{name}.jinja").write_text(name)
    quantize_checkpoint(Checkpoint.open(model), tmp_path / "packed", QuantizeOptions(type="f16"))
    tokenizer, warnings = keys(tmp_path / "packed")
    assert tokenizer["tokenizer.chat_template"] == "main"
    assert tokenizer["tokenizer.chat_templates"] == ["rag", "tool_use"]
    assert tokenizer["tokenizer.chat_template.rag"] == "rag"
    assert warnings == []


def test_a_template_that_is_a_link_to_elsewhere_is_refused(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "x.jinja").symlink_to("/etc/hostname")
    with pytest.raises(CameraError, match=r"x\.jinja is a link to"):
        Checkpoint.open(model)
