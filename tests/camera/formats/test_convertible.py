import json
from pathlib import Path
from typing import Any

import pytest

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.files import read_json
from camera.formats.convert import convert_to_gguf
from camera.formats.convertible import check_convertible
from camera.formats.gguf_reader import open_gguf
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.tiny import TOKENS, tiny_checkpoint


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**read_json(path), **changes}))


def test_before_the_work_the_same_is_said_as_after_it(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", "llama")
    edit(model / "tokenizer_config.json", add_prefix_space=False)
    expected = check_convertible(Checkpoint.open(model))
    assert len(expected) == 1
    quantize_checkpoint(Checkpoint.open(model), tmp_path / "packed", QuantizeOptions(type="f16"))
    assert convert_to_gguf(tmp_path / "packed", tmp_path / "m.gguf", name="m")["warnings"] == expected


def test_all_reasons_are_named_together_and_before_the_work_as_after_it(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", "qwen2")
    steps = [
        {"type": "WhitespaceSplit"},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    edit(model / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    edit(model / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    quantize_checkpoint(Checkpoint.open(model), tmp_path / "packed", QuantizeOptions(type="f16"))
    with pytest.raises(CameraError) as before:
        check_convertible(Checkpoint.open(model))
    with pytest.raises(CameraError) as after:
        convert_to_gguf(tmp_path / "packed", tmp_path / "m.gguf", name="m")
    for said in ("for 2 reasons", "dynamic", "splits text by a rule"):
        assert said in str(before.value)
    assert str(before.value) == str(after.value).replace(str(tmp_path / "packed"), str(model))


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_an_added_token_without_a_row_is_left_out_with_a_warning(tmp_path: Path, model_type: str) -> None:
    model = tiny_checkpoint(tmp_path / "model", model_type, vocab=TOKENS)
    token = {"content": "[PAD]", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    if model_type == "llama":
        edit(model / "tokenizer_config.json", added_tokens_decoder={str(TOKENS): {**token, "special": True}})
    else:
        added = read_json(model / "tokenizer.json")["added_tokens"]
        edit(model / "tokenizer.json", added_tokens=[*added, {"id": TOKENS, **token, "special": True}])
    edit(model / "tokenizer_config.json", pad_token="[PAD]")
    left_out = f"token {TOKENS} ('[PAD]') has no row of the embedding: it is left out"
    assert left_out in check_convertible(Checkpoint.open(model))
    quantize_checkpoint(Checkpoint.open(model), tmp_path / "packed", QuantizeOptions(type="f16"))
    convert_to_gguf(tmp_path / "packed", tmp_path / "m.gguf", name="m")
    tokens = open_gguf(tmp_path / "m.gguf").metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == TOKENS
    assert "[PAD]" not in tokens
