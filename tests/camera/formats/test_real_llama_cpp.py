"""What a stock llama.cpp makes of our GGUF files: the one in the extra `llama`."""

import json
import math
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.tokenizer import load_tokenizer
from camera.formats.convert import convert_to_gguf, write_twin
from camera.loading import load_model
from camera.options import BlockType, QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.camera.formats.test_convert import ROPES, with_rope
from tests.camera.formats.test_moe_gguf import ASKED
from tests.tiny import MODEL_TYPES, MOE_TYPES_IN_GGUF, tiny_checkpoint, tiny_moe_checkpoint

pytest.importorskip("xllamacpp", reason="the extra `llama` is not installed")

PROMPT = [1, *range(5, 45)]
LENGTHS = (1, 2, 7, 16, 40, 41)
"""After so many tokens of the prompt what comes next is compared."""
EOS = 2
SOME_WORD = 300
"""A token of ASCII letters in every tokenizer here."""
STEPS = 12
TEXTS = (
    "The old lighthouse keeper climbed the stairs.",
    " a leading space",
    "   three of them",
    "in  the   middle, trailing  ",
    "one line\nand another\n\n\nand a tab\there",
    "\n",
    "",
    "naïve café, übergroß, Ω≈ç√",
    "e\u0301 is not é",
    "系统：你好。",
    "🙂 👩‍👩‍👧 emoji",
    "numbers 7 12 345 6789, 3.14",
    "don't, WE'LL, it's",
    "def f(x):\n    return x**2  # code",
)


def ask(gguf: Path, *questions: tuple[str, dict[str, Any]]) -> list[Any]:
    """llama.cpp's answers, from a process of its own."""
    asked = {"model": str(gguf), "context": 256, "questions": questions}
    program = Path(__file__).with_name("ask_llama_cpp.py")
    done = subprocess.run(
        [sys.executable, "-P", str(program)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def converted(source: Path, out: Path, type: BlockType) -> Path:
    quantize_checkpoint(Checkpoint.open(source), out / type, QuantizeOptions(type=type))
    convert_to_gguf(out / type, out / f"{type}.gguf", name="tiny")
    return out / f"{type}.gguf"


def probabilities(gguf: Path, prompt: Sequence[int] = PROMPT) -> torch.Tensor:
    """llama.cpp's log-probabilities [lengths, vocabulary] of what comes after each of LENGTHS tokens."""
    # The server lists nothing for a token that ends the text or a character's middle, so the bias makes it pick
    # another; what it lists are the probabilities before the bias.
    body = {"n_predict": 1, "n_probs": 10**6, "logit_bias": [[SOME_WORD, 10**4]], "temperature": 0}
    answers = ask(gguf, *(("/completion", {"prompt": prompt[:length], **body}) for length in LENGTHS))
    rows = []
    for answer in answers:
        (step,) = answer["completion_probabilities"]
        by_token = {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}
        rows.append([by_token[token] for token in range(len(by_token))])
    return torch.tensor(rows)


def expected(model: Path, prompt: Sequence[int] = PROMPT) -> torch.Tensor:
    """transformers' of the same, from the dequantised weights where the model is quantised."""
    with torch.inference_mode():
        logits = load_model(model, dtype="float32", device="cpu")(torch.tensor([prompt])).logits[0]
    return logits[[length - 1 for length in LENGTHS]].log_softmax(-1)


def greedy(gguf: Path, prompt: Sequence[int] = PROMPT, steps: int = STEPS) -> list[int]:
    """The tokens llama.cpp picks after a prompt, up to the end of text."""
    body = {"prompt": prompt, "n_predict": steps, "temperature": 0, "return_tokens": True}
    (answer,) = ask(gguf, ("/completion", body))
    return [token for token in answer["tokens"] if token != EOS]


def expected_greedy(model: Path, prompt: Sequence[int] = PROMPT, steps: int = STEPS) -> list[int]:
    with torch.inference_mode():
        sequence = load_model(model, dtype="float32", device="cpu").generate(
            torch.tensor([prompt]), max_new_tokens=steps, do_sample=False, eos_token_id=EOS, pad_token_id=EOS
        )
    return [token for token in sequence[0, len(prompt) :].tolist() if token != EOS]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_float32_files_give_transformers_tokens_and_probabilities(
    tmp_path: Path, model_type: str, tied: bool
) -> None:
    source = tiny_checkpoint(tmp_path / "source", model_type, vocab=384, tied=tied)
    gguf = converted(source, tmp_path, "f32")
    torch.testing.assert_close(probabilities(gguf), expected(source), rtol=0, atol=1e-4)
    assert greedy(gguf) == expected_greedy(source)


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_rotary_positions_are_transformers(tmp_path: Path, kind: str) -> None:
    source = with_rope(tiny_checkpoint(tmp_path / "source", heads=1, kv_heads=1), ROPES[kind])
    gguf = converted(source, tmp_path, "f32")
    torch.testing.assert_close(probabilities(gguf), expected(source), rtol=0, atol=1e-4)


def test_a_pruned_width_is_read(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "PanguEmbedded", ffn=128)
    gguf = converted(source, tmp_path, "f32")
    torch.testing.assert_close(probabilities(gguf), expected(source), rtol=0, atol=1e-4)


@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_smaller_types_give_nearly_the_probabilities_of_their_numbers(
    tmp_path: Path, model_type: str, type: BlockType
) -> None:
    gguf = converted(tiny_checkpoint(tmp_path / "source", model_type, hidden=128), tmp_path, type)
    assert (probabilities(gguf) - expected(gguf)).abs().max() < 0.15  # llama.cpp rounds the activations too


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_twin_of_q4_0_64_runs_with_the_numbers_of_q4_0_64(tmp_path: Path, model_type: str) -> None:
    original = converted(tiny_checkpoint(tmp_path / "source", model_type, hidden=128), tmp_path, "q4_0_64")
    write_twin(original, tmp_path / "twin.gguf")
    assert (probabilities(tmp_path / "twin.gguf") - expected(original)).abs().max() < 0.15


def test_q4_0_64_itself_does_not_load(tmp_path: Path) -> None:
    gguf = converted(tiny_checkpoint(tmp_path / "source", hidden=128), tmp_path, "q4_0_64")
    with pytest.raises(AssertionError, match="failed to load model"):
        probabilities(gguf)


def compare_tokens(source: Path, gguf: Path, texts: Sequence[str]) -> None:
    tokenizer = load_tokenizer(source)
    assert tokenized(gguf, texts) == {text: tokenizer(text)["input_ids"] for text in texts}


def tokenized(gguf: Path, texts: Sequence[str]) -> dict[str, list[int]]:
    options = {"add_special": True, "parse_special": True}
    answers = ask(gguf, *(("/tokenize", {"content": text, **options}) for text in texts))
    return {text: answer["tokens"] for text, answer in zip(texts, answers, strict=True)}


def test_text_becomes_the_tokens_of_openpangus_tokenizer(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "PanguEmbedded")
    chats = (
        "[unused9]system: be kind[unused10][unused9]user: hello there[unused10]\n",
        "text [unused9] between </s> spaces",
    )
    compare_tokens(source, converted(source, tmp_path, "f32"), (*TEXTS, *chats))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_text_becomes_the_tokens_of_byte_level_tokenizers(tmp_path: Path, model_type: str) -> None:
    source = tiny_checkpoint(tmp_path / "source", model_type)
    chats = (
        "<|im_start|>system: be kind<|im_end|><|im_start|>user: hello there<|im_end|>\n",
        "text <|im_start|> between <|endoftext|> spaces",
    )
    # llama.cpp does not normalise: it takes a letter and its accent apart where they are two characters.
    composed = [unicodedata.normalize("NFC", text) for text in TEXTS]
    compare_tokens(source, converted(source, tmp_path, "f32"), (*composed, *chats))


def test_text_becomes_the_tokens_of_sentencepiece(tmp_path: Path) -> None:
    import sentencepiece

    source = tiny_checkpoint(tmp_path / "source", "llama")
    gguf = converted(source, tmp_path, "f32")
    model = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    assert tokenized(gguf, TEXTS) == {text: [1, *model.encode(text)] for text in TEXTS}
    # transformers' class for Llama puts no space before a text that starts with one.
    compare_tokens(source, gguf, [text for text in TEXTS if not text.startswith(" ")])


def test_a_chat_is_written_as_the_checkpoints_template_writes_it(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "PanguEmbedded")
    chat = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "who are you?"},
    ]
    (answer,) = ask(converted(source, tmp_path, "f32"), ("/apply-template", {"messages": chat}))
    template = load_tokenizer(source).apply_chat_template
    assert answer["prompt"] == template(chat, tokenize=False, add_generation_prompt=True)


def test_a_trained_model_tells_the_same_story(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "models" / "stories260k"
    gguf = converted(source, tmp_path, "f32")
    start = "Once upon a time"
    tokenizer = load_tokenizer(source)
    prompt = tokenizer(start)["input_ids"]
    compare_tokens(source, gguf, [start, *(text for text in TEXTS if not text.startswith(" "))])
    tokens = greedy(gguf, prompt, steps=60)
    assert tokens == expected_greedy(source, prompt, steps=60)
    (answer,) = ask(gguf, ("/completion", {"prompt": start, "n_predict": 60, "temperature": 0}))
    assert answer["content"] == tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)[len(start) :]
    assert "there was a little girl named" in answer["content"]
    story = [*prompt, *tokens]
    torch.testing.assert_close(probabilities(gguf, story), expected(source, story), rtol=0, atol=1e-4)


@pytest.mark.parametrize("type", ["q4_0", "q4_0_64"])
def test_a_trained_model_in_4_bits_stays_near_its_numbers(
    shared_data: Path, tmp_path: Path, type: BlockType
) -> None:
    source = shared_data / "models" / "stories260k"
    gguf = stock = converted(source, tmp_path, type)
    if type == "q4_0_64":
        stock = tmp_path / "twin.gguf"
        write_twin(gguf, stock)
    prompt = load_tokenizer(source)("Once upon a time")["input_ids"]
    story = [*prompt, *greedy(stock, prompt, steps=40)]
    found, wanted = probabilities(stock, story), expected(gguf, story)
    # In so narrow a model (64) the rounding of activations moves improbable tokens further.
    likely = wanted > math.log(0.01)
    assert (found - wanted)[likely].abs().max() < 0.15
    assert torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean") < 1e-3


def test_a_trained_mixture_of_experts_is_transformers(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "models" / "tiny-qwen3-moe"
    gguf = converted(source, tmp_path, "f32")
    tokenizer = load_tokenizer(source)
    text = "The following table describes the options of the command"
    prompt = (tokenizer(text)["input_ids"] * 5)[:41]
    compare_tokens(source, gguf, TEXTS)
    torch.testing.assert_close(probabilities(gguf, prompt), routed(source, prompt), rtol=0, atol=1e-4)
    small = converted(source, tmp_path, "q4_0")
    wanted = routed_from(small, prompt)
    found = probabilities(small, prompt)
    assert torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean") < 1e-2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MOE_TYPES_IN_GGUF)
def test_float32_files_of_experts_give_transformers_probabilities(
    tmp_path: Path, model_type: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_phimoe_as_llama_cpp(monkeypatch)
    source = tiny_moe_checkpoint(
        tmp_path / "source", model_type, vocab=384, tied=tied, **ASKED.get(model_type, {})
    )
    gguf = converted(source, tmp_path, "f32")
    torch.testing.assert_close(probabilities(gguf), routed(source), rtol=0, atol=1e-4)


PRUNED = {
    "deepseek_v2": {"moe_intermediate_size": 64, "n_routed_experts": 6},
    "ernie4_5_moe": {"moe_intermediate_size": 64, "moe_num_experts": 6},
    "hunyuan_v1_moe": {"intermediate_size": 64, "num_experts": 6},
    "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 32, "num_experts": 6},
}


@pytest.mark.parametrize("model_type", PRUNED)
def test_pruned_widths_and_numbers_of_experts_are_read(tmp_path: Path, model_type: str) -> None:
    source = tiny_moe_checkpoint(tmp_path / "source", model_type, vocab=384, **PRUNED[model_type])
    torch.testing.assert_close(
        probabilities(converted(source, tmp_path, "f32")), routed(source), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("model_type", MOE_TYPES_IN_GGUF)
def test_experts_in_4_bits_give_nearly_the_probabilities_of_their_numbers(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_phimoe_as_llama_cpp(monkeypatch)
    source = tiny_moe_checkpoint(tmp_path / "source", model_type, vocab=384, **ASKED.get(model_type, {}))
    gguf = converted(source, tmp_path, "q4_0")
    found, wanted = probabilities(gguf), routed_from(gguf)
    # llama.cpp rounds the activations too, which sends a token to another expert where two are nearly equal
    assert (found - wanted).abs().mean(-1).median() < 0.1


def compute_phimoe_as_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two known differences, which conversion warns of; all else is as in transformers."""
    monkeypatch.setattr("transformers.models.phimoe.modeling_phimoe.sparsemixer", softmax_of_two)
    monkeypatch.setattr("torch.nn.LayerNorm", NormWithoutMean)


def softmax_of_two(logits: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    best, chosen = logits.topk(2)
    return best.softmax(-1), chosen


class NormWithoutMean(torch.nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(input, self.normalized_shape, self.weight, self.eps) + self.bias


ROPES_OF_EXPERTS = {
    "deepseek_v2": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "hunyuan_v1_moe": {"rope_type": "dynamic", "alpha": 100.0, "factor": 1.0},
    "glm4_moe": {"rope_type": "default", "partial_rotary_factor": 0.75},
    "phimoe": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [1.5] * 8,
        "short_mscale": 1.25,
        "long_mscale": 1.25,
        "original_max_position_embeddings": 256,
    },
}


@pytest.mark.parametrize("model_type", ROPES_OF_EXPERTS)
def test_rotary_positions_of_families_with_experts_are_transformers(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_phimoe_as_llama_cpp(monkeypatch)
    source = tiny_moe_checkpoint(tmp_path / "source", model_type, vocab=384)
    gguf = converted(with_rope(source, ROPES_OF_EXPERTS[model_type]), tmp_path, "f32")
    found = probabilities(gguf)
    torch.testing.assert_close(found, routed(source), rtol=0, atol=1e-4)
    torch.testing.assert_close(found, routed_from(gguf), rtol=0, atol=1e-4)


def routed(source: Path, prompt: Sequence[int] = PROMPT) -> torch.Tensor:
    """As `expected`, of a checkpoint that transformers reads by itself."""
    from transformers import AutoModelForCausalLM

    return _log_probabilities(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), prompt)


def routed_from(gguf: Path, prompt: Sequence[int] = PROMPT) -> torch.Tensor:
    """As `expected`, of the numbers in a file."""
    from camera.checkpoints.safetensors_file import write_tensors
    from camera.formats.gguf_reader import hf_config, hf_names, open_gguf, read_hf_tensor

    folder = gguf.with_suffix(".read")
    folder.mkdir()
    file = open_gguf(gguf)
    (folder / "config.json").write_text(json.dumps(hf_config(file)))
    tensors = {name: read_hf_tensor(file, name).contiguous() for name in hf_names(file)}
    write_tensors(folder / "model.safetensors", tensors)
    return routed(folder, prompt)


def _log_probabilities(model: Any, prompt: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([prompt])).logits[0]
    result: torch.Tensor = logits[[length - 1 for length in LENGTHS]].log_softmax(-1)
    return result
