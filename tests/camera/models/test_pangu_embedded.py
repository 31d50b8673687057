"""openPangu-Embedded in transformers, without the code that its checkpoints carry."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.models.pangu.modeling import (
    PanguEmbeddedConfig,
    PanguEmbeddedForCausalLM,
    PanguEmbeddedModel,
    PanguTokenizer,
    register,
)
from camera.pruning.model_writer import ModelWriter
from tests.tiny import tiny_checkpoint

TEXTS = [
    "The lighthouse keeper counted 12 ships.",
    "  two leading spaces, and one at the end ",
    "first line\n\n    indented\n\tand a tab\r\n",
    "naïve café, Ω ≈ 3, 系统：你好。 \U0001f680 \u200b \u00a0",
    "\n",
    " ",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    register()
    return tiny_checkpoint(tmp_path_factory.mktemp("pangu") / "model", "PanguEmbedded", shards=2)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PanguTokenizer:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@pytest.fixture(scope="module")
def processor(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_the_published_config_loads_without_remote_code(shared_data: Path) -> None:
    register()
    config = AutoConfig.from_pretrained(shared_data / "openpangu", trust_remote_code=False)
    assert type(config) is PanguEmbeddedConfig
    assert config.attention_bias is True
    assert config.mlp_bias is False
    assert config.head_dim == 128
    assert config.rope_parameters["rope_theta"] == 16_000_000.0
    assert config.eos_token_id == 45892


def test_a_saved_config_has_the_published_keys_and_no_remote_code(shared_data: Path, tmp_path: Path) -> None:
    published = json.loads((shared_data / "openpangu" / "config.json").read_text())
    register()
    AutoConfig.from_pretrained(shared_data / "openpangu").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in saved
    saved["torch_dtype"] = saved.pop("dtype")  # transformers 5 writes the new name and reads both
    for changed in ("auto_map", "transformers_version"):
        published.pop(changed)
        saved.pop(changed, None)
    assert saved == published


def test_the_published_config_gives_the_tensors_of_the_published_index(shared_data: Path) -> None:
    register()
    config = AutoConfig.from_pretrained(shared_data / "openpangu")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    index = json.loads((shared_data / "openpangu" / "model.safetensors.index.json").read_text())
    stored = {name for name in index["weight_map"] if not name.endswith("rotary_emb.inv_freq")}
    assert set(model.state_dict()) == stored
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_887_936


def test_a_config_without_bias_has_no_attention_biases(tmp_path: Path) -> None:
    config = PanguEmbeddedConfig(
        bias=False,
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=64,
        vocab_size=8,
    )
    assert not any(name.endswith("bias") for name in PanguEmbeddedForCausalLM(config).state_dict())
    config.save_pretrained(tmp_path)
    assert PanguEmbeddedConfig.from_pretrained(tmp_path).attention_bias is False


def test_rope_scaling_survives_a_round_trip(tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    PanguEmbeddedConfig(rope_parameters=scaled).save_pretrained(tmp_path)
    assert PanguEmbeddedConfig.from_pretrained(tmp_path).rope_parameters == scaled


def test_a_head_size_of_its_own_survives_a_round_trip(tmp_path: Path) -> None:
    PanguEmbeddedConfig(hidden_size=64, num_attention_heads=4, head_dim=32).save_pretrained(tmp_path)
    assert PanguEmbeddedConfig.from_pretrained(tmp_path).head_dim == 32


def test_registering_again_changes_nothing(folder: Path) -> None:
    register()
    register.__wrapped__()
    assert type(AutoConfig.from_pretrained(folder)) is PanguEmbeddedConfig


def test_logits_are_bit_equal_to_a_llama_with_attention_bias(folder: Path) -> None:
    pangu = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(pangu) is PanguEmbeddedForCausalLM
    config = pangu.config.to_dict()
    for name in ("model_type", "architectures", "bias"):
        config.pop(name)
    llama = LlamaForCausalLM(LlamaConfig(**config, attention_bias=True)).eval()
    llama.load_state_dict(pangu.state_dict())
    ids = torch.randint(0, pangu.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(pangu(input_ids=ids).logits, llama(input_ids=ids).logits)
    assert pangu.model.layers[0].self_attn.o_proj.bias.abs().max() > 0, "the biases take part"


def test_rotary_buffers_in_the_checkpoint_are_ignored_in_silence(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Checkpoint.open(folder)
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in checkpoint.tensors
    capfd.readouterr()
    model, report = PanguEmbeddedForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    output = capfd.readouterr()
    assert "inv_freq" not in output.out + output.err
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_decoder_alone_loads_with_the_same_weights(folder: Path) -> None:
    decoder = AutoModel.from_pretrained(folder)
    assert type(decoder) is PanguEmbeddedModel
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(decoder.layers[1].mlp.down_proj.weight, whole.model.layers[1].mlp.down_proj.weight)


def test_a_saved_model_loads_again_and_computes_the_same(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_a_checkpoint_opens_through_our_own_reader(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.check_shapes()
    assert type(checkpoint.load_model()) is PanguEmbeddedForCausalLM
    assert type(checkpoint.load_tokenizer()) is PanguTokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_encoded_as_sentencepiece_encodes_it(
    text: str, tokenizer: PanguTokenizer, processor: sentencepiece.SentencePieceProcessor
) -> None:
    assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)
    assert tokenizer.encode(text) == [processor.bos_id(), *processor.encode(text)]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_decoded_as_sentencepiece_decodes_them(
    text: str, tokenizer: PanguTokenizer, processor: sentencepiece.SentencePieceProcessor
) -> None:
    ids = processor.encode(text)
    assert tokenizer.decode([processor.bos_id(), *ids], skip_special_tokens=True) == processor.decode(ids)


@pytest.fixture(scope="module")
def real_model(shared_data: Path) -> str:
    return str(shared_data / "models" / "llama2_tokenizer.model")


@pytest.fixture(scope="module")
def real_texts(shared_data: Path) -> list[str]:
    names = ("wikitext2_test_raw.txt", "tinystories_sample.txt")
    texts = [(shared_data / "text" / name).read_text(encoding="utf-8")[:200_000] for name in names]
    # `<unk>` spelled out in a text is a special token, and those are tested below.
    return [*TEXTS, *(text.replace("<unk>", "unk") for text in texts)]


def test_a_real_32k_model_encodes_real_text_as_sentencepiece_does_and_decodes_it_again(
    real_model: str, real_texts: list[str]
) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=real_model)
    tokenizer = PanguTokenizer(vocab_file=real_model, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    for text in real_texts:
        ids = tokenizer.encode(text)
        assert ids == [1, *processor.encode(text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_special_token_is_one_token_and_splits_the_text(
    tokenizer: PanguTokenizer, processor: sentencepiece.SentencePieceProcessor
) -> None:
    ids = tokenizer.encode("[unused9]user: hi[unused10]next", add_special_tokens=False)
    nine, ten = processor.piece_to_id("[unused9]"), processor.piece_to_id("[unused10]")
    assert ids == [nine, *processor.encode("user: hi"), ten, *processor.encode("next")]
    assert tokenizer.decode(ids) == "[unused9]user: hi[unused10]next"


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (True, True), (False, True), (False, False)])
def test_begin_and_end_tokens_are_as_configured_and_survive_saving(
    bos: bool, eos: bool, folder: Path, tmp_path: Path
) -> None:
    original = AutoTokenizer.from_pretrained(folder, add_bos_token=bos, add_eos_token=eos)
    original.save_pretrained(tmp_path)
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    for tokenizer in (original, AutoTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer.encode("word")
        assert (ids[0] == tokenizer.bos_token_id) is bos
        assert (ids[-1] == tokenizer.eos_token_id) is eos
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (saved["add_bos_token"], saved["add_eos_token"]) == (bos, eos)


def test_the_published_tokenizer_config_needs_no_remote_code(shared_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    shutil.copytree(shared_data / "openpangu", folder, copy_function=shutil.copyfile)
    shutil.copyfile(shared_data / "models" / "llama2_tokenizer.model", folder / "tokenizer.model")
    register()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert type(tokenizer) is PanguTokenizer
    turn = [{"role": "user", "content": "hi"}]
    assert "[unused9]用户：hi[unused10]" in tokenizer.apply_chat_template(turn, tokenize=False)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())


def test_a_missing_tokenizer_model_is_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "tokenizer.model").unlink()
    with pytest.raises(CameraError, match=r"tokenizer\.model is missing"):
        Checkpoint.open(copy).load_tokenizer()


def test_a_pruned_model_carries_config_code_of_ours_where_the_source_lacks_the_one_it_names(
    tmp_path: Path,
) -> None:
    source = Checkpoint.open(tiny_checkpoint(tmp_path / "model", "PanguEmbedded"))
    assert not list(source.folder.glob("*.py"))
    (tmp_path / "out").mkdir()
    writer = ModelWriter(source, tmp_path / "out", "physical", {"max_window_layers": 1}, changed=False)
    writer.write_rest()
    writer.finish()
    ask = (
        "import sys; from transformers import AutoConfig; c = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True);"
        " print(type(c).__name__, c.attention_bias, c.bias, c.intermediate_size, 'camera' in sys.modules)"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    told = subprocess.run(
        [sys.executable, "-c", ask, tmp_path / "out"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == ["PanguEmbeddedConfig", "True", "True", "192", "False"]
