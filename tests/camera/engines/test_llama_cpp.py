import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.engines.llama_cpp import LlamaCppEngine
from camera.engines.parts.llama_build import find_build
from camera.errors import CameraError
from camera.formats.convert import convert_to_gguf, write_twin
from camera.formats.gguf_reader import is_q4_0_64, open_gguf
from camera.options import BenchmarkOptions, QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.camera.engines.conftest import put_program
from tests.tiny import tiny_moe_checkpoint

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Card:
    """What an engine asks of a torch.device, of a kind that torch alone does not know."""

    type: str
    index: int | None = None

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


def engine_of(path: Path, options: BenchmarkOptions, device: Card | torch.device = CPU) -> LlamaCppEngine:
    return LlamaCppEngine(path, options, device)  # type: ignore[arg-type]


def options(llama_cpp: Path, **more: object) -> BenchmarkOptions:
    return BenchmarkOptions(engines=("llama.cpp",), llama_cpp=llama_cpp, **more)


def calls(tmp_path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> BenchmarkOptions:
    """Options under which the llama.cpp of the extra `llama` runs, as on a machine without another."""
    pytest.importorskip("xllamacpp", reason="the extra `llama` is not installed")
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("PATH", "")
    return BenchmarkOptions(engines=("llama.cpp",), threads=1, device="cpu", timeout=60)


def test_the_binary_is_found_in_the_named_folder_then_the_environment_then_the_path(
    llama_cpp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = str(llama_cpp / "build" / "bin" / "llama-bench")
    assert find_build(llama_cpp).command == (binary,)
    monkeypatch.setenv("PATH", str(Path(binary).parent))
    assert find_build(None).command == (binary,)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(llama_cpp / "build"))
    assert find_build(None).name == binary


@pytest.mark.usefixtures("wheel")
def test_the_extra_serves_where_there_is_no_binary(tmp_path: Path) -> None:
    assert find_build(None).name.startswith("xllamacpp 20")
    with pytest.raises(CameraError, match="holds no llama-bench"):
        find_build(tmp_path)  # what the user names is not passed over


def test_without_either_it_is_said_what_to_install_or_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(CameraError, match=r"not on PATH.*pip install 'camera-npu\[llama\]'.*\$LLAMA_CPP_DIR"):
        find_build(None)


def test_the_extra_times_a_model_for_real(wheel: BenchmarkOptions, ggufs: dict[str, Path]) -> None:
    engine = engine_of(ggufs["q4_0"], wheel)
    timing = engine.time_once(4, (16, 508))  # 4 + 508 are all the model's positions
    assert 0 < timing.prefill_s < 10
    assert 0 < timing.decode_s[16] < timing.decode_s[508] < 30
    described = engine.describe()
    assert described["build_commit"] == described["binary"] == find_build(None).name
    assert described["build_number"] > 10_000
    assert described["backends"].startswith("CPU")
    assert described["n_threads"] == 1


def test_the_extra_says_why_it_cannot_run_a_model(wheel: BenchmarkOptions, ggufs: dict[str, Path]) -> None:
    engine = engine_of(ggufs["q4_0"], wheel)
    with pytest.raises(CameraError, match=r"exit code 1: asked for 3 \+ 600 tokens"):
        engine.time_once(4, (599,))


def test_one_run_asks_for_one_repeat_and_reads_seconds(
    llama_cpp: Path, tmp_path: Path, ggufs: dict[str, Path]
) -> None:
    engine = engine_of(ggufs["q4_0"], options(llama_cpp, threads=3, device="cpu"))
    timing = engine.time_once(4, (32, 16))
    assert timing.prefill_s == pytest.approx(0.004)
    assert timing.decode_s == {16: pytest.approx(0.032), 32: pytest.approx(0.064)}
    assert calls(tmp_path) == [
        {"m": str(ggufs["q4_0"]), "p": "4", "n": "16,32", "r": "1", "o": "json", "t": "3", "ngl": "0"}
        | {"sm": None, "mg": None, "v": False}
    ]


def test_the_build_and_the_settings_of_its_backend_are_recorded(
    llama_cpp: Path, ggufs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GGML_CANN_WEIGHT_NZ", "0")
    engine = engine_of(ggufs["q4_0"], options(llama_cpp))
    engine.time_once(4, (16,))
    described = engine.describe()
    assert (described["build_commit"], described["backends"]) == ("abc1234", "CPU")
    assert described["settings"] == {"GGML_CANN_WEIGHT_NZ": "0"}


def test_in_the_place_of_q4_0_64_its_twin_runs(wheel: BenchmarkOptions, ggufs: dict[str, Path]) -> None:
    engine = engine_of(ggufs["q4_0_64"], wheel)
    assert engine.stand_in == "its Q4_0 twin: the build does not read Q4_0_64"
    assert "failed to load model" in engine.describe()["why_twin"]
    assert engine.path != ggufs["q4_0_64"]
    assert not is_q4_0_64(open_gguf(engine.path))
    assert engine.time_once(4, (16,)).decode_s[16] > 0
    assert engine.footprint().model_bytes == engine.path.stat().st_size
    engine.close()
    assert not engine.path.exists()
    assert ggufs["q4_0_64"].is_file()


def test_a_twin_that_lies_beside_the_file_is_used_and_stays(
    llama_cpp: Path, tmp_path: Path, ggufs: dict[str, Path]
) -> None:
    original, beside = tmp_path / "model.gguf", tmp_path / "model-q4_0-twin.gguf"
    shutil.copyfile(ggufs["q4_0_64"], original)
    write_twin(original, beside)
    engine = engine_of(original, options(llama_cpp))
    assert (engine.path, engine.stand_in) == (beside, "its Q4_0 twin: the build does not read Q4_0_64")
    engine.close()
    assert beside.is_file()


@pytest.mark.parametrize("damage", ["of other weights", "no twin", "no GGUF"])
def test_a_file_of_that_name_that_is_no_twin_is_not_used(
    llama_cpp: Path, tmp_path: Path, ggufs: dict[str, Path], damage: str
) -> None:
    original, beside = tmp_path / "model.gguf", tmp_path / "model-q4_0-twin.gguf"
    shutil.copyfile(ggufs["q4_0_64"], original)
    if damage == "of other weights":
        write_twin(original, beside)
        tensor = open_gguf(beside).tensors["blk.1.ffn_down.weight"]
        content = beside.read_bytes()
        row = tensor.data[0].tobytes()
        beside.write_bytes(content.replace(row, bytes(len(row))))
    elif damage == "no twin":
        shutil.copyfile(ggufs["q4_0"], beside)
    else:
        beside.write_bytes(b"text")
    engine = engine_of(original, options(llama_cpp))
    assert engine.path != beside
    assert str(engine.stand_in).startswith("its Q4_0 twin")
    engine.close()


def test_a_folder_is_refused(llama_cpp: Path, tmp_path: Path) -> None:
    with pytest.raises(CameraError, match=r"is a folder: llama\.cpp reads GGUF files"):
        engine_of(tmp_path, options(llama_cpp))


def test_a_process_that_hangs_is_ended_with_its_children(
    llama_cpp: Path, tmp_path: Path, ggufs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LLAMA_BENCH", "hang")
    engine = engine_of(ggufs["q4_0"], options(llama_cpp, timeout=2))
    start = time.monotonic()
    with pytest.raises(CameraError, match="was ended after 2 s"):
        engine.time_once(4, (16,))
    assert time.monotonic() - start < 10
    child = int((tmp_path / "calls.jsonl").read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {child} still runs"
        time.sleep(0.05)


def test_a_failure_gives_the_last_lines_it_wrote(
    llama_cpp: Path, ggufs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LLAMA_BENCH", "fail")
    with pytest.raises(CameraError, match=r"(?s)exit code 1.*failed to load model"):
        engine_of(ggufs["q4_0"], options(llama_cpp)).time_once(4, (16,))


def test_a_crash_in_llama_cpp_ends_its_process_only(
    llama_cpp: Path, ggufs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LLAMA_BENCH", "crash")
    with pytest.raises(CameraError, match="exit code -11"):
        engine_of(ggufs["q4_0"], options(llama_cpp)).time_once(4, (16,))


def test_output_that_is_not_json_is_refused(
    llama_cpp: Path, ggufs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LLAMA_BENCH", "garbage")
    with pytest.raises(CameraError, match=r"printed something else: '\| model"):
        engine_of(ggufs["q4_0"], options(llama_cpp)).time_once(4, (16,))


def test_a_token_reads_all_weights_but_the_embedding(llama_cpp: Path, ggufs: dict[str, Path]) -> None:
    engine = engine_of(ggufs["q4_0"], options(llama_cpp))
    engine.time_once(4, (16,))
    found = engine.footprint()
    tensors = open_gguf(ggufs["q4_0"]).tensors
    everything = sum(tensor.size_bytes for tensor in tensors.values())
    assert found.weight_bytes_per_token == everything - tensors["token_embd.weight"].data.nbytes
    assert found.kv_bytes_per_position == 2 * 2 * 2 * 32 * 2  # keys and values, layers, kv heads, width, f16
    assert found.model_bytes == os.path.getsize(ggufs["q4_0"])


@pytest.mark.parametrize(("model_type", "cached"), [("qwen3_moe", 2 * 2 * 16), ("deepseek_v2", 32 + 16)])
def test_a_token_reads_the_experts_it_is_routed_to(
    llama_cpp: Path, tmp_path: Path, model_type: str, cached: int
) -> None:
    source = tiny_moe_checkpoint(tmp_path / "source", model_type)
    quantize_checkpoint(Checkpoint.open(source), tmp_path / "packed", QuantizeOptions(type="q4_0"))
    convert_to_gguf(tmp_path / "packed", tmp_path / "model.gguf", name="tiny")
    found = engine_of(tmp_path / "model.gguf", options(llama_cpp)).footprint()
    sizes = {name: tensor.size_bytes for name, tensor in open_gguf(tmp_path / "model.gguf").tensors.items()}
    routed = sum(size for name, size in sizes.items() if "_exps." in name)
    everything = sum(sizes.values()) - sizes["token_embd.weight"]
    assert found.weight_bytes_per_token == everything - routed * 5 // 8
    assert found.kv_bytes_per_position == cached * 3 * 2  # layers, f16
    assert found.model_bytes == os.path.getsize(tmp_path / "model.gguf")


def test_another_build_has_another_digest_whether_it_is_the_program_or_a_library(llama_cpp: Path) -> None:
    found = [find_build(llama_cpp).digest()]
    binary = llama_cpp / "build" / "bin" / "llama-bench"
    (binary.parent / "libggml.so").write_bytes(b"1")
    found.append(find_build(llama_cpp).digest())
    (binary.parent / "libggml.so").write_bytes(b"2")
    found.append(find_build(llama_cpp).digest())
    binary.write_text(binary.read_text() + "# another\n")
    found.append(find_build(llama_cpp).digest())
    assert len(set(found)) == 4
    assert find_build(llama_cpp).digest() == found[-1]


def test_a_result_is_of_its_builds_and_of_what_their_backends_are_told(
    llama_cpp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identity(**more: object) -> str:
        return json.dumps(LlamaCppEngine.identity(options(llama_cpp, **more)))

    put_program(tmp_path / "stock", "llama-bench", "fake_llama_perplexity.py")
    found = {identity(), identity(llama_cpp_stock=tmp_path / "stock")}
    monkeypatch.setenv("GGML_CANN_WEIGHT_NZ", "0")
    found.add(identity())
    monkeypatch.setenv("GGML_CANN_WEIGHT_NZ", "1")
    found.add(identity())
    assert len(found) == 4
    assert LlamaCppEngine.identity(options(tmp_path))["build"] is None


def test_a_stock_build_runs_what_holds_no_q4_0_64(
    llama_cpp: Path, tmp_path: Path, ggufs: dict[str, Path]
) -> None:
    put_program(tmp_path / "stock", "llama-bench", "fake_llama_bench.py")
    both = options(llama_cpp, llama_cpp_stock=tmp_path / "stock")
    for type in ("q4_0", "q4_0_64"):  # the second as its twin
        engine = engine_of(ggufs[type], both)
        assert engine.describe()["binary"] == str(tmp_path / "stock" / "build" / "bin" / "llama-bench")
        engine.close()
    with pytest.raises(CameraError, match=r"llama_cpp_stock: .* holds no llama-bench"):
        engine_of(ggufs["q4_0"], options(llama_cpp, llama_cpp_stock=tmp_path / "none"))


@pytest.mark.parametrize(("device", "backend"), [(Card("npu", 1), "CANN"), (Card("cuda"), "CUDA")])
@pytest.mark.parametrize("type", ["q4_0", "q4_0_64"])
def test_a_build_that_would_compute_on_the_cpu_is_not_timed_as_a_card(
    llama_cpp: Path, ggufs: dict[str, Path], device: Card, backend: str, type: str
) -> None:
    with pytest.raises(
        CameraError, match=f"does not run on {device}: its backends are CPU, without {backend}"
    ):
        engine_of(ggufs[type], options(llama_cpp, device=str(device)), device)


def test_a_build_that_finds_no_card_is_not_timed_as_one(
    llama_cpp: Path, ggufs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LLAMA_BACKENDS", "CANN")
    with pytest.raises(CameraError, match="does not run on npu: its backends are CANN, and it finds no card"):
        engine_of(ggufs["q4_0"], options(llama_cpp, device="npu"), Card("npu"))


@pytest.mark.parametrize(
    ("log", "mode"),
    [
        ("ggml_backend_cann_context: device 0 execution mode is GRAPH (acl graph enabled)", "GRAPH"),
        ("ggml_backend_cann_context: device 0 execution mode is EAGER (acl graph disabled)", "EAGER"),
        ("built without graphs", "EAGER"),
    ],
)
def test_on_a_card_one_is_taken_and_how_it_is_driven_is_recorded(
    llama_cpp: Path,
    tmp_path: Path,
    ggufs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    log: str,
    mode: str,
) -> None:
    monkeypatch.setenv("FAKE_LLAMA_BACKENDS", "CANN,CPU")
    monkeypatch.setenv("FAKE_LLAMA_CARDS", "Ascend910B1")
    monkeypatch.setenv("FAKE_LLAMA_LOG", log)
    engine = engine_of(ggufs["q4_0"], options(llama_cpp, device="npu:1"), Card("npu", 1))
    engine.time_once(4, (16,))
    assert engine.describe()["execution_mode"] == mode
    assert engine.describe()["gpu_info"] == "Ascend910B1"
    timed = calls(tmp_path)[-1]
    assert (timed["ngl"], timed["sm"], timed["mg"], timed["v"]) == ("99", "none", "1", False)
