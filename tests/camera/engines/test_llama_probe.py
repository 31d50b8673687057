"""Whether a build reads Q4_0_64, asked of a program with llama.cpp's command line; and of a real build, where there is one."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from camera.engines.llama_cpp import LlamaCppEngine
from camera.engines.parts.llama_build import find_build
from camera.engines.parts.llama_probe import ask_reading, read_log_probabilities, write_tiny
from camera.loading import load_model
from camera.options import BenchmarkOptions
from tests.camera.engines.conftest import put_program

TOKENS = list(range(3, 35))
FLAGS = ("-ngl", "99")


def as_written(log_p_TV: np.ndarray) -> bytes:
    """A file of llama-perplexity's `--kl-divergence-base`, of one window."""
    vocabulary = log_p_TV.shape[1]
    rows = []
    for log_p in log_p_TV:
        lowest = log_p.min()
        step = (log_p.max() - lowest) / 65535
        codes = np.round((log_p - lowest) / step).astype(np.uint16)
        rows.append(
            np.array([step, lowest], np.float32).tobytes() + codes.tobytes() + b"\0\0" * (vocabulary % 2)
        )
    head = np.array([len(TOKENS), vocabulary, 1, *TOKENS], np.int32)
    return b"_logits_" + head.tobytes() + b"".join(rows)


@pytest.fixture(scope="session")
def tiny_log_p(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """float32 [tokens, vocabulary] that the weights of the tiny file have, after the second half of the tokens but the last."""
    _, twin = write_tiny(tmp_path_factory.mktemp("tiny"))
    with torch.inference_mode():
        logits_TV = load_model(twin, dtype="float32", device="cpu")(torch.tensor([TOKENS])).logits[0]
    found: np.ndarray = logits_TV[16:-1].log_softmax(-1).numpy()
    return found


@pytest.fixture
def build(llama_cpp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_log_p: np.ndarray) -> Path:
    """A build that reads Q4_0_64; `logits/` holds what its llama-perplexity writes."""
    put_program(llama_cpp, "llama-perplexity", "fake_llama_perplexity.py")
    monkeypatch.setenv("FAKE_LLAMA_LOADS", "1")
    monkeypatch.setenv("FAKE_LOGITS", str(tmp_path / "logits"))
    (tmp_path / "logits").mkdir()
    noisy = tiny_log_p + np.random.default_rng(0).normal(0, 0.02, tiny_log_p.shape).astype(np.float32)
    for type in ("q4_0", "q4_0_64"):
        (tmp_path / "logits" / f"{type}.logits").write_bytes(as_written(noisy))
    return llama_cpp


def test_what_llama_perplexity_writes_is_read_back(tiny_log_p: np.ndarray) -> None:
    for log_p_TV in (tiny_log_p, tiny_log_p[:, :319]):
        tokens, found_TV = read_log_probabilities(as_written(log_p_TV))
        assert tokens == TOKENS
        np.testing.assert_allclose(found_TV, log_p_TV, atol=1e-4)
        with pytest.raises(ValueError, match="buffer"):
            read_log_probabilities(as_written(log_p_TV)[:-1])


def test_a_build_whose_logits_are_right_runs_the_file_itself(
    build: Path, ggufs: dict[str, Path], tmp_path: Path
) -> None:
    engine = LlamaCppEngine(
        ggufs["q4_0_64"], BenchmarkOptions(engines=("llama.cpp",), llama_cpp=build), torch.device("cpu")
    )
    assert engine.time_once(4, (16,)).decode_s == {16: pytest.approx(0.032)}
    assert (engine.path, engine.stand_in) == (ggufs["q4_0_64"], None)
    assert "why_twin" not in engine.describe()


def test_a_yes_is_kept_for_the_build_the_card_and_its_settings(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(name: str = "910B", cann: str = "9.1") -> bool:
        before = (tmp_path / "calls.jsonl").stat().st_size if (tmp_path / "calls.jsonl").exists() else 0
        assert ask_reading(find_build(build), FLAGS, {"name": name, "cann": cann}).reads
        return (tmp_path / "calls.jsonl").stat().st_size > before

    assert [asked(), asked(), asked("910C"), asked(cann="9.2")] == [True, False, True, True]
    monkeypatch.setenv("GGML_CANN_ACL_GRAPH", "off")
    assert [asked(), asked()] == [True, False]
    (build / "build" / "bin" / "libggml.so").write_bytes(b"1")
    assert asked()


@pytest.mark.parametrize("wrong", ["garbage", "not a number", "crash", "another file"])
def test_a_build_that_computes_something_else_does_not_read_it(
    build: Path, tmp_path: Path, tiny_log_p: np.ndarray, wrong: str
) -> None:
    written = tmp_path / "logits" / "q4_0_64.logits"
    if wrong == "garbage":
        written.write_bytes(as_written(np.roll(tiny_log_p, 1, axis=1)))
    elif wrong == "not a number":
        written.write_bytes(
            as_written(tiny_log_p).replace(tiny_log_p.min(axis=1)[3].tobytes(), b"\0\0\xc0\x7f")
        )
    elif wrong == "crash":
        written.unlink()
    else:
        written.write_bytes(b"text")
    found = ask_reading(find_build(build), FLAGS, {"name": "910B", "cann": "9.1"})
    assert found.reads is False
    said = {"crash": "exit code 1", "another file": "wrote no log-probabilities"}.get(
        wrong, "computes Q4_0_64 wrongly"
    )
    assert said in str(found.why_not)


def test_where_nothing_can_be_asked_it_is_said_why(
    build: Path, tmp_path: Path, tiny_log_p: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logits" / "q4_0.logits").write_bytes(as_written(np.roll(tiny_log_p, 1, axis=1)))
    found = ask_reading(find_build(build), FLAGS, {"name": "910B", "cann": "9.1"})
    assert found.reads is None
    assert "computes Q4_0 wrongly" in str(found.why_not)
    (build / "build" / "bin" / "llama-perplexity").unlink()
    found = ask_reading(find_build(build), FLAGS, {"name": "910B", "cann": "9.1"})
    assert found.reads is None
    assert "no llama-perplexity beside it" in str(found.why_not)
    monkeypatch.setenv("FAKE_LLAMA_BENCH", "crash")
    found = ask_reading(find_build(build), FLAGS, {"name": "910B", "cann": "9.1"})
    assert found.reads is None
    assert "exit code -11" in str(found.why_not)


def test_a_real_stock_build_is_found_not_to_read_it_and_to_compute_q4_0(tmp_path: Path) -> None:
    folder = os.environ.get("CAMERA_STOCK_LLAMA_CPP")
    if folder is None:
        pytest.skip("CAMERA_STOCK_LLAMA_CPP does not name the folder of a stock build of llama.cpp")
    from camera.engines.parts.llama_probe import PERPLEXITY, distance_of

    found = find_build(Path(folder))
    assert ask_reading(found, ("-ngl", "0"), {"name": "cpu"}).reads is False
    _, twin = write_tiny(tmp_path)
    assert distance_of(str(found.beside(PERPLEXITY)), ("-ngl", "0"), twin) < 1e-3
