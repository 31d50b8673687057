import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.errors import CameraError
from camera.evaluation import head
from camera.evaluation.perplexity import perplexity
from camera.formats.convert import convert_to_gguf
from camera.formats.quantized_model import QuantizedModel
from camera.options import BlockType, QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.tiny import MODEL_TYPES, TOKENS, tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model", "PanguEmbedded")


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return Checkpoint.open(folder).load_model(torch.float32)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, TOKENS, (333,), generator=torch.Generator().manual_seed(0))


def by_hand(model: PreTrainedModel, windows: list[torch.Tensor]) -> float:
    """exp of the mean loss of every token but the first of each window, from transformers' own logits."""
    losses = []
    with torch.no_grad():
        for window in windows:
            log_probabilities = model(input_ids=window[None]).logits[0].double().log_softmax(-1)
            losses += [-float(log_probabilities[i, window[i + 1]]) for i in range(len(window) - 1)]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_it_is_the_mean_over_all_tokens_but_the_first_of_each_window(
    tmp_path: Path, tokens: torch.Tensor, model_type: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", model_type, tied=model_type == "qwen2", shards=2)
    result = perplexity(folder, tokens, window=100, device="cpu")
    reference = Checkpoint.open(folder).load_model(torch.float32)
    assert result.perplexity == pytest.approx(by_hand(reference, list(tokens[:300].view(3, 100))), rel=1e-5)
    assert (result.windows, result.window, result.tokens) == (3, 100, 3 * 99)
    assert result.perplexity == pytest.approx(math.exp(result.nll_sum / result.tokens))


def test_batches_do_not_change_it(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    one_by_one = perplexity(model, tokens, window=32, batch_size=1)
    for batch_size in (3, 100):
        assert perplexity(model, tokens, window=32, batch_size=batch_size).nll_sum == pytest.approx(
            one_by_one.nll_sum, rel=1e-6
        )


def test_a_vocabulary_too_large_for_one_piece_of_logits_does_not_change_it(
    model: PreTrainedModel, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = perplexity(model, tokens, window=100)
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 7 * TOKENS)
    assert perplexity(model, tokens, window=100).nll_sum == pytest.approx(whole.nll_sum, rel=1e-6)


def test_a_last_partial_window_is_dropped(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    assert perplexity(model, tokens[:250], window=100) == perplexity(model, tokens[:200], window=100)


def test_a_text_shorter_than_the_window_is_one_window(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    result = perplexity(model, tokens[:2], window=100)
    assert (result.windows, result.window, result.tokens) == (1, 2, 1)
    assert result.perplexity == pytest.approx(by_hand(model, [tokens[:2]]), rel=1e-5)


def test_a_window_is_never_longer_than_the_models_positions(model: PreTrainedModel) -> None:
    tokens = torch.arange(1100) % TOKENS
    assert perplexity(model, tokens, window=2048).window == model.config.max_position_embeddings == 512


def test_only_so_many_windows_are_read(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    limited = perplexity(model, tokens, window=50, max_windows=2)
    assert limited == perplexity(model, tokens[:100], window=50)


@pytest.mark.parametrize("count", [0, 1])
def test_a_text_without_a_token_to_score_is_refused(model: PreTrainedModel, count: int) -> None:
    with pytest.raises(CameraError, match="at least 2 tokens"):
        perplexity(model, torch.zeros(count, dtype=torch.int64))


def test_tokens_of_another_vocabulary_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(CameraError, match=f"reach from 0 to {TOKENS} and the model has {TOKENS}"):
        perplexity(model, torch.arange(TOKENS + 1))


def test_nan_is_refused_with_its_window_and_layer(folder: Path, tokens: torch.Tensor) -> None:
    damaged = Checkpoint.open(folder).load_model(torch.float32)
    damaged.get_decoder().layers[1].mlp.down_proj.weight.data[5, 7] = torch.nan
    with pytest.raises(CameraError, match="window 0: decoder layer 1 computes NaN or infinity in float32"):
        perplexity(damaged, tokens, window=100)


def test_a_window_that_overflows_in_half_precision_is_named(folder: Path, tokens: torch.Tensor) -> None:
    half = Checkpoint.open(folder).load_model(torch.float16)
    rare = next(token for token in range(TOKENS) if token not in tokens[:100] and token in tokens[100:200])
    with torch.no_grad():
        half.get_input_embeddings().weight[rare] = 6e4
        half.get_decoder().layers[0].self_attn.o_proj.bias.fill_(6e4)
        half.get_input_embeddings().weight[torch.arange(TOKENS) != rare] = 0
    with pytest.raises(
        CameraError, match=r"window 1: decoder layer 0 .*float16; float16 overflows above 65504"
    ):
        perplexity(half, tokens, window=100, batch_size=1)


def test_infinite_weights_are_refused_when_they_are_read(tmp_path: Path, tokens: torch.Tensor) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    checkpoint = Checkpoint.open(folder)
    tensors = {name: checkpoint.read(name).clone() for name in checkpoint.tensors}
    tensors["model.norm.weight"][3] = torch.inf
    write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(CameraError, match=r"model\.norm\.weight holds NaN or infinity"):
        perplexity(folder, tokens)


def test_progress_counts_windows(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    seen: list[tuple[int, int]] = []
    perplexity(
        model, tokens, window=50, batch_size=4, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(4, 6), (6, 6)]


def test_the_result_says_what_computed_it(folder: Path, tokens: torch.Tensor) -> None:
    result = asdict(perplexity(folder, tokens, window=100, dtype="bfloat16", device="cpu"))
    assert (result["dtype"], result["device"]) == ("bfloat16", "cpu")


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> PreTrainedModel:
    return Checkpoint.open(shared_data / "models" / "stories260k").load_model(torch.float32)


def ids_of(shared_data: Path, text: str) -> torch.Tensor:
    tokenizer = Checkpoint.open(shared_data / "models" / "stories260k").load_tokenizer()
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


@pytest.mark.parametrize(
    ("file", "between", "published"),
    [("tinystories_sample.txt", "<|endoftext|>", 4.14), ("wikitext2_test_raw.txt", "\n", 107.0)],
)
def test_a_real_model_has_about_the_perplexity_that_is_known_of_it(
    shared_data: Path, stories: PreTrainedModel, file: str, between: str, published: float
) -> None:
    # How the texts were joined for the published figures is not known to the last space.
    parts = (shared_data / "text" / file).read_text(encoding="utf-8")[:100_000].split(between)
    ids = ids_of(shared_data, "\n\n".join(part.strip("\n") for part in parts))
    measured = perplexity(stories, ids, window=256, max_windows=40)
    assert measured.perplexity == pytest.approx(published, rel=0.12)


def test_a_real_model_agrees_with_transformers_loss(shared_data: Path, stories: PreTrainedModel) -> None:
    text = (shared_data / "text" / "wikitext2_test_raw.txt").read_text(encoding="utf-8")[:6000]
    windows_WT = ids_of(shared_data, text)[: 4 * 256].view(4, 256)
    with torch.no_grad():
        losses = [float(stories(input_ids=window[None], labels=window[None]).loss) for window in windows_WT]
    measured = perplexity(stories, windows_WT.reshape(-1), window=256)
    assert math.log(measured.perplexity) == pytest.approx(sum(losses) / 4, rel=1e-5)


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "q4_0_64"])
def test_a_quantised_folder_and_its_gguf_are_measured_with_their_dequantised_weights(
    tmp_path: Path, folder: Path, tokens: torch.Tensor, kind: BlockType
) -> None:
    quantize_checkpoint(Checkpoint.open(folder), tmp_path / "packed", QuantizeOptions(type=kind))
    convert_to_gguf(tmp_path / "packed", tmp_path / "model.gguf", name="tiny")
    reference = Checkpoint.open(folder).load_model(torch.float32)
    reference.load_state_dict(QuantizedModel.open(tmp_path / "packed").state_dict())
    expected = perplexity(reference, tokens, window=100)
    for source in (tmp_path / "packed", tmp_path / "model.gguf"):
        measured = perplexity(source, tokens, window=100, dtype="float32", device="cpu")
        assert measured.nll_sum == pytest.approx(expected.nll_sum, rel=1e-6), source
    original = perplexity(folder, tokens, window=100, device="cpu")
    assert measured.nll_sum != pytest.approx(original.nll_sum, rel=1e-6)
