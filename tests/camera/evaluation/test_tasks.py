"""Tasks measured with our engines, against lm-eval's own wrapper and against transformers alone."""

import json
import math
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.tokenizer import load_tokenizer
from camera.engines.parts.int4_linear import Int4Linear
from camera.engines.torch_engine import TorchEngine
from camera.errors import CameraError
from camera.evaluation import head, text_model
from camera.evaluation import tasks as module
from camera.evaluation.language_model import CameraLM
from camera.evaluation.lm_eval_tasks import open_task
from camera.evaluation.tasks import TaskResult, evaluate_tasks, read_task_result
from camera.evaluation.text_model import open_text_model
from camera.formats.convert import convert_to_gguf
from camera.formats.quantized_model import QuantizedModel
from camera.loading import load_model
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.tiny import MODEL_TYPES, TOKENS, tiny_checkpoint, tiny_moe_checkpoint

TASKS = ("arc_easy", "boolq")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model", "PanguEmbedded")


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return Checkpoint.open(folder).load_model(torch.float32)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return Checkpoint.open(folder).load_tokenizer()


def by_hand(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[float, bool]:
    """From transformers' own logits of the one sequence, nothing padded."""
    whole = tokenizer(context + continuation, return_tensors="pt").input_ids[0]
    begin = len(tokenizer(context).input_ids)
    with torch.no_grad():
        log_p = model(input_ids=whole[None]).logits[0].double().log_softmax(-1)
    scored = [float(log_p[at - 1, whole[at]]) for at in range(begin, len(whole))]
    greedy = [int(log_p[at - 1].argmax()) == int(whole[at]) for at in range(begin, len(whole))]
    return sum(scored), all(greedy)


def request(context: str, continuation: str) -> Instance:
    return Instance("loglikelihood", {}, (context, continuation), 0)


REQUESTS = [
    ("Question: will they all come home?\nAnswer:", " the light keeps burning"),
    ("Question: will they all come home?\nAnswer:", " no"),
    ("The old", " lighthouse keeper climbed the narrow stairs each evening to light the great lamp"),
    ("He counted 12 ships, then 34, then 56, and wrote the numbers in his book:", " 7"),
    ("He counted 12 ships, then 34, then 56, and wrote the numbers in his book:", " 8"),
]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_log_likelihoods_are_those_of_transformers(tmp_path: Path, model_type: str, batch_size: int) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "m", model_type, tied=model_type == "qwen2"))
    model, tokenizer = checkpoint.load_model(torch.float32), checkpoint.load_tokenizer()
    found = CameraLM(open_text_model(model), tokenizer, batch_size).loglikelihood(
        [request(*texts) for texts in REQUESTS]
    )
    for (score, greedy), texts in zip(found, REQUESTS, strict=True):
        expected, expected_greedy = by_hand(model, tokenizer, *texts)
        assert score == pytest.approx(expected, rel=1e-5)
        assert greedy == expected_greedy


def test_the_likeliest_continuation_is_known_as_such(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    context = "The old lighthouse"
    ids = tokenizer(context, return_tensors="pt").input_ids
    with torch.no_grad():
        likeliest = int(model(input_ids=ids).logits[0, -1].argmax())
    language_model = CameraLM(open_text_model(model), tokenizer)
    for token in (likeliest, (likeliest + 7) % TOKENS):
        (_, greedy), *_ = language_model._loglikelihood_tokens([(("", ""), ids[0].tolist(), [token])])
        assert greedy == (token == likeliest)


def test_a_vocabulary_too_large_for_one_piece_of_logits_does_not_change_them(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(*texts) for texts in REQUESTS]
    whole = CameraLM(open_text_model(model), tokenizer).loglikelihood(requests)
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 2 * TOKENS)
    for (score, _), (expected, _) in zip(
        CameraLM(open_text_model(model), tokenizer).loglikelihood(requests), whole, strict=True
    ):
        assert score == pytest.approx(expected, rel=1e-6)


def test_answers_of_one_token_share_their_sequence(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = tokenizer("The old lighthouse keeper").input_ids
    seen: list[int] = []
    opened = open_text_model(model)
    hidden = opened.hidden
    monkeypatch.setattr(
        opened, "hidden", lambda ids_BT, *how: (seen.append(len(ids_BT)), hidden(ids_BT, *how))[1]
    )
    CameraLM(opened, tokenizer)._loglikelihood_tokens(
        [(("", ""), context, [token]) for token in (40, 50, 60)]
    )
    assert seen == [1]


@pytest.mark.parametrize("few_shot", [0, 3])
def test_every_document_is_judged_as_by_lm_evals_own_wrapper(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task_folder: Path, few_shot: int
) -> None:
    found = evaluate_tasks(
        folder, TASKS, task_folder=task_folder, few_shot=few_shot, dtype="float32", device="cpu", batch_size=4
    )
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    for name in TASKS:
        with open_task(name, task_folder, few_shot) as task:
            expected = evaluate(theirs, {"tasks": {name: task}})
        for metric, measured in found[name].metrics.items():
            values = expected["results"][name]
            assert measured.value == pytest.approx(values[f"{metric},none"])
            assert measured.standard_error == pytest.approx(values[f"{metric}_stderr,none"])
            assert list(measured.of_documents) == [entry[metric] for entry in expected["samples"][name]]
    assert set(found["arc_easy"].metrics) == {"acc", "acc_norm"}
    assert set(found["boolq"].metrics) == {"acc"}


def test_what_is_longer_than_the_model_is_cut_as_by_lm_evals_own_wrapper(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    long = "The wind pushed hard against the windows of the tower. " * 60
    assert len(tokenizer(long).input_ids) > model.config.max_position_embeddings
    requests = [request(long, answer) for answer in (" yes", " the light keeps burning")]
    ours = CameraLM(open_text_model(model), tokenizer).loglikelihood(requests)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer).loglikelihood(requests, disable_tqdm=True)
    for (score, _), (expected, _) in zip(ours, theirs, strict=True):
        assert score == pytest.approx(expected, rel=1e-5)


def test_a_trained_model_agrees_with_lm_evals_own_wrapper_on_real_questions(shared_data: Path) -> None:
    checkpoint = Checkpoint.open(shared_data / "models" / "stories260k")
    model, tokenizer = checkpoint.load_model(torch.float32), checkpoint.load_tokenizer()
    found = evaluate_tasks(
        model, ["piqa"], tokenizer=tokenizer, task_folder=shared_data / "tasks", limit=24, batch_size=16
    )["piqa"]
    with open_task("piqa", shared_data / "tasks") as task:
        expected = evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16), {"tasks": {"piqa": task}}, limit=24
        )
    for metric, measured in found.metrics.items():
        assert list(measured.of_documents) == [entry[metric] for entry in expected["samples"]["piqa"]]
        assert measured.value == pytest.approx(expected["results"]["piqa"][f"{metric},none"])


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_layer_by_layer_every_answer_is_the_whole_models(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = tiny_checkpoint if model_type == "llama" else tiny_moe_checkpoint
    folder = make(tmp_path / "model", model_type)
    tokenizer = load_tokenizer(folder)
    requests = [request(*texts) for texts in REQUESTS]
    whole, layers = (
        CameraLM(open_text_model(folder, device="cpu", layer_by_layer=each), tokenizer, batch_size=2)
        for each in (False, True)
    )
    expected = whole.loglikelihood(requests)
    done: list[int] = []
    layers.progress = lambda answered, total: done.append(answered)
    for found in (layers.loglikelihood(requests), _in_parts_of_two(layers, requests, monkeypatch)):
        for (score, greedy), (wanted, wanted_greedy) in zip(found, expected, strict=True):
            assert score == pytest.approx(wanted, rel=1e-5)
            assert greedy == wanted_greedy
    assert done[-1] == len(requests)
    assert any(0 < each < len(requests) for each in done)


def _in_parts_of_two(
    model: CameraLM, requests: list[Instance], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[float, bool]]:
    monkeypatch.setattr(text_model, "HIDDEN_BYTES", 0)
    return model.loglikelihood(requests)


@pytest.mark.parametrize("form", ["packed", "gguf"])
def test_a_quantised_model_is_measured_with_its_dequantised_weights(
    tmp_path: Path, folder: Path, task_folder: Path, form: str
) -> None:
    quantize_checkpoint(Checkpoint.open(folder), tmp_path / "packed", QuantizeOptions(type="q4_0"))
    convert_to_gguf(tmp_path / "packed", tmp_path / "model.gguf", name="tiny")
    reference = Checkpoint.open(folder).load_model(torch.float32)
    reference.load_state_dict(QuantizedModel.open(tmp_path / "packed").state_dict())
    expected = evaluate_tasks(reference, TASKS, tokenizer=folder, task_folder=task_folder)
    source = tmp_path / ("packed" if form == "packed" else "model.gguf")
    found = evaluate_tasks(
        source, TASKS, tokenizer=folder, task_folder=task_folder, dtype="float32", device="cpu"
    )
    assert found == expected


def test_a_limit_takes_the_first_documents(model: PreTrainedModel, folder: Path, task_folder: Path) -> None:
    whole, part = (
        evaluate_tasks(model, ["arc_easy"], tokenizer=folder, task_folder=task_folder, limit=limit)[
            "arc_easy"
        ]
        for limit in (None, 5)
    )
    assert (whole.documents, part.documents) == (12, 5)
    assert part.metrics["acc"].of_documents == whole.metrics["acc"].of_documents[:5]
    assert part.prompts != whole.prompts


class Stopped(BaseException):
    """What a kill looks like from inside."""


def test_a_killed_evaluation_goes_on_with_the_tasks_that_are_not_done(
    tmp_path: Path, folder: Path, task_folder: Path
) -> None:
    def stop_in_the_second(task: str, done: int, total: int) -> None:
        if task == TASKS[1]:
            raise Stopped

    how = {"task_folder": task_folder, "out": tmp_path / "out", "dtype": "float32", "device": "cpu"}
    with pytest.raises(Stopped):
        evaluate_tasks(folder, TASKS, progress=stop_in_the_second, **how)  # type: ignore[arg-type]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["arc_easy.json"]
    measured: list[str] = []
    found = evaluate_tasks(folder, TASKS, progress=lambda task, *_: measured.append(task), **how)  # type: ignore[arg-type]
    assert set(measured) == {"boolq"}
    whole = evaluate_tasks(folder, TASKS, task_folder=task_folder, dtype="float32", device="cpu")
    assert found == whole


@pytest.mark.parametrize("change", ["model", "few_shot", "limit", "data"])
def test_results_of_something_else_are_not_taken_for_these(
    tmp_path: Path, folder: Path, task_folder: Path, change: str
) -> None:
    rows = (task_folder / "boolq.validation.jsonl").read_text()
    (tmp_path / "boolq.validation.jsonl").write_text(rows)
    how = {"task_folder": tmp_path, "out": tmp_path / "out", "dtype": "float32", "device": "cpu"}
    evaluate_tasks(folder, ["boolq"], limit=2, **how)  # type: ignore[arg-type]
    other = folder
    asked = {"limit": 2, "few_shot": 0}
    if change == "model":
        other = tiny_checkpoint(tmp_path / "other", "PanguEmbedded", seed=1)
    elif change == "data":
        (tmp_path / "boolq.validation.jsonl").write_text("\n".join(rows.splitlines()[1:]))
    else:
        asked[change] += 1
    with pytest.raises(CameraError, match=r"boolq\.json holds the result of another model or other options"):
        evaluate_tasks(other, ["boolq"], **asked, **how)  # type: ignore[arg-type]


def test_a_model_in_memory_is_not_resumed(model: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CameraError, match="in memory"):
        evaluate_tasks(model, ["boolq"], tokenizer=folder, out=tmp_path)


def test_progress_counts_the_answers_of_each_task(
    model: PreTrainedModel, folder: Path, task_folder: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    evaluate_tasks(
        model,
        TASKS,
        tokenizer=folder,
        task_folder=task_folder,
        progress=lambda task, done, total: seen.append((task, done, total)),
    )
    assert [total for task, done, total in seen if done == total] == [12 * 4, 10 * 2]
    assert all(done <= total for _, done, total in seen)


def test_nan_is_refused_with_the_text_on_which_it_arose(folder: Path, task_folder: Path) -> None:
    damaged = Checkpoint.open(folder).load_model(torch.float32)
    damaged.get_decoder().layers[1].mlp.down_proj.weight.data[5, 7] = torch.nan
    with pytest.raises(CameraError, match=r"NaN or infinity in float32 on the text '.*Answer:'"):
        evaluate_tasks(damaged, ["arc_easy"], tokenizer=folder, task_folder=task_folder)


def test_without_a_tokenizer_a_model_in_memory_is_refused(model: PreTrainedModel, task_folder: Path) -> None:
    with pytest.raises(CameraError, match="tokenizer"):
        evaluate_tasks(model, ["boolq"], task_folder=task_folder)


def test_without_lm_eval_the_message_says_how_to_install_it(
    model: PreTrainedModel, folder: Path, task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("camera.evaluation.lm_eval_tasks.version", absent)
    with pytest.raises(CameraError, match=r"pip install 'camera-npu\[tasks\]'"):
        evaluate_tasks(model, ["boolq"], tokenizer=folder, task_folder=task_folder)


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path, folder: Path, task_folder: Path) -> None:
    found = evaluate_tasks(folder, ["boolq"], task_folder=task_folder, out=tmp_path, device="cpu")["boolq"]
    assert read_task_result(tmp_path / "boolq.json") == found
    assert isinstance(found, TaskResult)
    assert not math.isnan(found.headline().value)
    assert found.headline(normalised=True) == found.metrics["acc"]
    content = json.loads((tmp_path / "boolq.json").read_text())
    del content["prompts"]
    (tmp_path / "boolq.json").write_text(json.dumps(content))
    with pytest.raises(CameraError, match=r"boolq\.json is no result of a task \(prompts\)"):
        read_task_result(tmp_path / "boolq.json")


def test_the_headline_is_normalised_where_the_task_defines_it(
    model: PreTrainedModel, folder: Path, task_folder: Path
) -> None:
    found = module.evaluate_tasks(model, ["arc_easy"], tokenizer=folder, task_folder=task_folder)["arc_easy"]
    assert found.headline(normalised=True) == found.metrics["acc_norm"]
    assert found.headline() == found.metrics["acc"]


def test_a_model_on_4_bit_kernels_answers_as_with_dequantised_weights_but_for_rounding(
    tmp_path: Path, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    quantize_checkpoint(Checkpoint.open(folder), tmp_path / "packed", QuantizeOptions(type="q4_0_64"))
    kernels = TorchEngine(tmp_path / "packed", torch.device("cpu"), 64).model
    assert any(isinstance(module, Int4Linear) for module in kernels.modules())
    exact = load_model(tmp_path / "packed", "float32", "cpu")
    requests = [request(*texts) for texts in REQUESTS]
    found, expected = (
        CameraLM(open_text_model(each), tokenizer).loglikelihood(requests) for each in (kernels, exact)
    )
    for (score, _), (wanted, _) in zip(found, expected, strict=True):
        assert score == pytest.approx(wanted, rel=0.02)
