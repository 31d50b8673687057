"""The commands that pack weights for calibration tokens, and the one that says what was lost."""

import json

import pytest

from camera.formats.quantized_model import QuantizedModel
from tests.flows.conftest import Workplace

TOKENS = ("--samples", "6", "--length", "64", "--device", "cpu")
TEXT = ("--calibration", "calibration.txt")


def test_gptq_is_nearer_to_the_model_than_rounding_to_nearest(workplace: Workplace):
    workplace.camera("quantize", "model", "rtn", "--type", "q4_0")
    workplace.camera("quantize", "model", "gptq", "--type", "q4_0", "--method", "gptq", *TEXT, *TOKENS)
    found = []
    for packed in ("gptq", "rtn"):
        done = workplace.camera(
            *("evaluate", packed, "--reference", "model", "--text", "held-out.txt", "--json"),
            *("--window", "64", "--dtype", "float32"),
        )
        found.append(json.loads(done.stdout)["divergence"]["divergence"])
    assert 0 < found[0] < found[1]
    told = workplace.camera("evaluate", "rtn", "--reference", "model", "--text", "held-out.txt").stdout
    assert "perplexity " in told
    assert "KL divergence 0." in told


def test_an_importance_matrix_from_a_file_is_the_search_that_calibrates_itself(workplace: Workplace):
    workplace.camera("imatrix", "model", "imatrix.gguf", *TEXT, *TOKENS)
    search = ("--type", "q4_0", "--method", "search")
    workplace.camera("quantize", "model", "a", *search, "--imatrix", "imatrix.gguf")
    workplace.camera("quantize", "model", "b", *search, *TEXT, *TOKENS)
    first, second = (QuantizedModel.open(workplace.folder / name) for name in "ab")
    assert all((first.packed(name) == second.packed(name)).all() for name in first.tensors)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--method", "gptq", "--imatrix", "x.gguf"), "imatrix goes with method search"),
        (("--method", "search", "--imatrix", "x.gguf", *TEXT), "in place of calibration"),
        (TEXT, "calibration goes with method search or gptq"),
        (("--method", "gptq", "--damping", "0", *TEXT), "--damping"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(workplace: Workplace, flags: tuple[str, ...], words: str):
    done = workplace.camera("quantize", "model", "packed", *flags, check=False)
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    assert not (workplace.folder / "packed").exists()
