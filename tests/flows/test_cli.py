"""The command line: help, single stages, and what a wrong input gets for an answer."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from tests.flows.conftest import Workplace

COMMANDS = (
    *("run", "plan", "sweep", "capture", "score", "prune", "save"),
    *("imatrix", "quantize", "convert", "evaluate", "bench", "audit", "doctor", "npu-check"),
)


def test_help_lists_every_command_and_imports_nothing_heavy(workplace: Workplace):
    done = workplace.camera("--help")
    for command in COMMANDS:
        assert f" {command} " in done.stdout
    code = "import camera.cli, sys; print([m for m in ('torch', 'transformers', 'prefect', 'mlflow', 'pydantic') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example(workplace: Workplace, command: str):
    assert "camera " + command in workplace.camera(command, "--help").stdout.replace("Usage: ", "")


def test_prune_goes_from_a_checkpoint_and_text_to_a_hugging_face_folder(workplace: Workplace):
    workplace.camera(
        *("prune", "model", "out", "--calibration", "calibration.txt", "--ratio", "0.4"),
        *("--samples", "4", "--length", "64", "--dtype", "float32"),
    )
    source, pruned = Checkpoint.open(workplace.folder / "model"), Checkpoint.open(workplace.folder / "out")
    assert (source.ffn_width, pruned.ffn_width) == (192, 128)
    assert not list((workplace.folder / "out").glob(".work"))
    assert "README.md" in pruned.side_files


def test_prune_names_a_refused_layer_once_and_states_the_zeros(workplace: Workplace):
    done = workplace.camera(
        *("prune", "model", "out", "--calibration", "calibration.txt", "--ratio", "0.4"),
        *("--samples", "2", "--length", "64", "--method", "refit", "--sparsity", "0.5"),
    )
    told = done.stdout + done.stderr
    assert "refitted 0 of" in told
    assert told.count("layer 0: refit rejected, fell back to CAMERA: ") == 1
    assert "50.0 % of the feed-forward weights that stay are zero" in told


@pytest.mark.slow
def test_the_single_stages_make_what_prune_makes_in_one_go(workplace: Workplace):
    common = ("--samples", "4", "--length", "64", "--dtype", "float32", "--propagate", "one-shot")
    workplace.camera("capture", "model", "stats", "--calibration", "calibration.txt", *common)
    workplace.camera("score", "model", "stats", "scores")
    workplace.camera("prune", "model", "pruned", "--scores", "scores", "--ratio", "0.4")
    workplace.camera("save", "model", "pruned", "saved")
    workplace.camera(
        "prune", "model", "direct", "--calibration", "calibration.txt", "--ratio", "0.4", *common
    )
    for file in Checkpoint.open(workplace.folder / "saved").weight_files:
        assert (workplace.folder / "saved" / file).read_bytes() == (
            workplace.folder / "direct" / file
        ).read_bytes()

    workplace.camera("quantize", "saved", "packed", "--type", "q4_0_64")
    workplace.camera("convert", "packed", "model.gguf", "--twin", "q4_0")
    packed = json.loads(workplace.camera("evaluate", "packed", "--text", "held-out.txt", "--json").stdout)
    from_gguf = json.loads(
        workplace.camera(
            *("evaluate", "model-q4_0-twin.gguf", "--tokenizer", "saved", "--text", "held-out.txt"),
            *("--dtype", "bfloat16", "--json"),
        ).stdout
    )
    assert packed["perplexity"] == pytest.approx(from_gguf["perplexity"], rel=1e-6)
    table = workplace.camera(
        *("bench", "model.gguf", "--baseline", "model-q4_0-twin.gguf", "--decode", "8", "--repeats", "2")
    ).stdout
    assert "model.gguf" in table


def test_calibration_tokens_may_come_from_a_safetensors_file_and_then_need_no_tokenizer(workplace: Workplace):
    edit(workplace)
    model = workplace.folder / "model"
    for name in Checkpoint.open(model).tokenizer_files:
        (model / name).unlink()
    tokens = torch.randint(3, 300, (4, 64), generator=torch.Generator().manual_seed(0))
    write_tensors(workplace.folder / "tokens.safetensors", {"input_ids": tokens})
    windows = ("--calibration", "tokens.safetensors", "--samples", "4", "--length", "64")
    workplace.camera("capture", "model", "stats", *windows, "--dtype", "float32")
    assert "layers.0.sum_squares" in read_tensors(workplace.folder / "stats" / "statistics.safetensors")
    workplace.camera("prune", "model", "out", *windows, "--ratio", "0.4")
    assert Checkpoint.open(workplace.folder / "out").ffn_width == 128


def test_doctor_says_where_things_are(workplace: Workplace):
    found = json.loads(workplace.camera("doctor", "--json").stdout)
    names = {entry["name"] for entry in found}
    assert {"torch", "npu", "cuda", "cpu", "store", "mlflow", "prefect"} <= names


def edit(workplace: Workplace, **changes: object) -> None:
    """Replace the model by a copy with other config values."""
    copy = workplace.folder / "copy"
    shutil.copytree(workplace.folder / "model", copy)
    (workplace.folder / "model").unlink()
    copy.rename(workplace.folder / "model")
    config = workplace.folder / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))


WRONG_RUNS = {
    "unknown recipe key": (("--set", "prune.ration=0.3"), "prune.ration: no such field"),
    "ratio of 1": (("--set", "prune.ratio=1.0"), "prune"),
    "ratio below 0": (("--set", "prune.ratio=-0.1"), "prune.ratio"),
    "nothing would be pruned": (("--set", "prune.ratio=0.05"), "nothing would be pruned"),
    "no such model": (("--set", "model=nowhere"), "nowhere"),
    "no such text": (("--set", "calibration.path=nowhere.txt"), "nowhere.txt"),
    "windows longer than the text": (
        ("--set", "calibration.length=400", "--set", "calibration.path=short.txt"),
        "short.txt",
    ),
    "a device that is not there": (("--set", "capture.device=npu"), "npu"),
    "a hub that cannot be reached": (("--set", "calibration={name: wikitext2}"), "wikitext"),
}


@pytest.mark.parametrize("case", WRONG_RUNS)
def test_a_wrong_input_gets_one_message_and_exit_code_2(workplace: Workplace, case: str):
    arguments, message = WRONG_RUNS[case]
    (workplace.folder / "short.txt").write_text("the sea")
    done = workplace.camera("run", "recipe.yaml", "--no-prefect", *arguments, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workplace.folder / "published").exists()


def test_an_unsupported_family_is_named(workplace: Workplace):
    edit(workplace, model_type="mamba")
    done = workplace.camera("run", "recipe.yaml", "--no-prefect", check=False)
    assert (done.returncode, "'mamba' is not supported" in done.stderr) == (2, True)


def test_shapes_that_contradict_the_config_are_named(workplace: Workplace):
    edit(workplace, intermediate_size=256)
    done = workplace.camera("prune", "model", "out", "--calibration", "calibration.txt", check=False)
    assert (done.returncode, "mlp." in done.stderr) == (2, True)
    assert not (workplace.folder / "out").exists()


def test_a_truncated_shard_is_named(workplace: Workplace):
    edit(workplace)
    shard = sorted((workplace.folder / "model").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    done = workplace.camera("plan", "recipe.yaml", check=False)
    assert (done.returncode, shard.name in done.stderr) == (2, True)


def test_an_output_folder_with_other_content_is_left_alone(workplace: Workplace):
    (workplace.folder / "out").mkdir()
    (workplace.folder / "out" / "thesis.txt").write_text("mine")
    done = workplace.camera("prune", "model", "out", "--calibration", "calibration.txt", check=False)
    assert (done.returncode, "out already exists" in done.stderr) == (2, True)
    (workplace.folder / "published" / "tiny").mkdir(parents=True)
    (workplace.folder / "published" / "tiny" / "thesis.txt").write_text("mine")
    done = workplace.camera("run", "recipe.yaml", "--no-prefect", check=False)
    assert (done.returncode, "other content" in done.stderr) == (2, True)


def test_a_folder_without_lineage_cannot_be_audited(workplace: Workplace):
    done = workplace.camera("audit", "model", check=False)
    assert (done.returncode, "lineage.json" in done.stderr) == (2, True)


def test_nan_in_a_weight_is_named_and_nothing_is_left_under_the_final_name(workplace: Workplace):
    edit(workplace)
    model = Checkpoint.open(workplace.folder / "model")
    name = model.ffn_names(1)[2]
    path = Path(model.folder) / model.tensors[name].file
    tensors = {each: tensor.clone() for each, tensor in read_tensors(path).items()}  # the map is written over
    tensors[name][0, 0] = float("nan")
    write_tensors(path, tensors)
    arguments = ("--samples", "2", "--length", "32", "--ratio", "0.4")
    done = workplace.camera(
        "prune", "model", "out", "--calibration", "calibration.txt", *arguments, check=False
    )
    assert (done.returncode, name in done.stderr) == (2, True)
    assert not (workplace.folder / "out").exists()
