from pathlib import Path
from time import process_time
from typing import Any

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import TensorInfo
from camera.errors import CameraError
from camera.evaluation.divergence import divergence
from camera.files import read_json
from camera.models import FAMILIES
from camera.options import BlockType, QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from camera.quantization.imatrix import collect_imatrix, read_imatrix, write_imatrix
from camera.quantization.plan import choose_types, concerns, notable_types, plan_types, spend
from camera.quantization.sensitivity import sensitivities
from camera.registry import BLOCK_FORMATS
from tests.tiny import TOKENS, tiny_checkpoint, tiny_moe_checkpoint

TOKENS_ST = torch.randint(3, TOKENS, (6, 48), generator=torch.Generator().manual_seed(0))


def options(target: float | None, type: BlockType = "q4_0_64", **more: object) -> QuantizeOptions:
    return QuantizeOptions.model_validate(
        {"type": type, "target_bpw": target, "device": "cpu", "batch_size": 4, **more}
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(tmp_path_factory.mktemp("source"), "PanguEmbedded", ffn=256))


def test_bits_go_where_each_spares_the_most_noise() -> None:
    sizes: dict[BlockType, int] = {"q4_0": 4, "q8_0": 8, "f16": 16}
    bits = {"a": sizes, "b": sizes, "fixed": {"f32": 32}}  # type: ignore[dict-item]
    noise: dict[str, dict[BlockType, float]] = {
        "a": {"q4_0": 10.0, "q8_0": 1.0, "f16": 0.0},
        "b": {"q4_0": 5.0, "q8_0": 0.5, "f16": 0.0},
    }
    chosen = [tuple(spend(bits, noise, budget).values())[:2] for budget in (40, 43, 44, 48, 55, 56, 64)]
    assert chosen == [
        ("q4_0", "q4_0"), ("q4_0", "q4_0"), ("q8_0", "q4_0"), ("q8_0", "q8_0"), ("q8_0", "q8_0"), ("f16", "q8_0"),
        ("f16", "f16"),
    ]  # fmt: skip


@pytest.mark.parametrize("target", [4.6, 5.0, 7.5, 11.0])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_model_is_just_within_the_target(
    source: Checkpoint, tmp_path: Path, target: float, method: str
) -> None:
    report = quantize_checkpoint(source, tmp_path / "out", options(target, method=method), TOKENS_ST)
    left = (target - report.bits_per_weight) * report.parameters
    assert left >= 0
    for record in report.tensors:
        finer = [form.bits_per_weight for form in (BLOCK_FORMATS["q8_0"], BLOCK_FORMATS["f16"])]
        steps = [bits - record.bits_per_weight for bits in finer if bits > record.bits_per_weight]
        assert all(step * record.parameters > left for step in steps), record.name
    assert report.target_bpw == target
    assert {record.name for record in report.finer}


def test_a_target_that_no_types_come_to_is_refused_with_the_range(source: Checkpoint, tmp_path: Path) -> None:
    for target in (4.0, 17.0):
        with pytest.raises(CameraError, match=r"quantize\.target_bpw: .*: 4\.\d+ to 16\.\d+ can") as refused:
            quantize_checkpoint(source, tmp_path / "out", options(target), TOKENS_ST)
    lowest = float(str(refused.value).split(": ")[-1].split(" ")[0])
    report = quantize_checkpoint(source, tmp_path / "out", options(lowest), TOKENS_ST)
    assert lowest - 0.001 <= report.bits_per_weight <= lowest


def test_overrides_and_the_types_of_head_and_embedding_stay_and_count(source: Checkpoint) -> None:
    asked = options(
        8.0, output_type="q8_0", overrides={"*.v_proj.weight": "q4_0_64", "*.1.*.up_proj.*": "f16"}
    )
    imatrix = collect_imatrix(source, TOKENS_ST, asked)
    chosen = choose_types(source, asked, imatrix).overrides
    assert list(chosen)[-2:] == list(asked.overrides)
    assert not [
        name for name in list(chosen)[:-2] if "v_proj" in name or "1.mlp.up" in name or "lm_head" in name
    ]


def test_a_target_without_calibration_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CameraError, match=r"quantize\.target_bpw needs calibration tokens, or an imatrix"):
        quantize_checkpoint(source, tmp_path / "out", options(5.0))


def test_an_importance_matrix_from_a_file_chooses_the_same_types(source: Checkpoint, tmp_path: Path) -> None:
    imatrix = collect_imatrix(source, TOKENS_ST, options(5.0))
    write_imatrix(tmp_path / "imatrix.gguf", imatrix, source)
    read = read_imatrix(tmp_path / "imatrix.gguf", source)
    assert choose_types(source, options(5.0), read) == choose_types(source, options(5.0), imatrix)


def test_a_branch_that_adds_nothing_is_not_worth_a_bit(tmp_path: Path) -> None:
    from camera.checkpoints.safetensors_file import read_tensors, write_tensors

    folder = tiny_checkpoint(tmp_path, "llama")
    tensors = {name: each.clone() for name, each in read_tensors(folder / "model.safetensors").items()}
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e-4
    write_tensors(folder / "model.safetensors", tensors)
    source = Checkpoint.open(folder)
    names = [f"model.layers.{layer}.mlp.gate_proj.weight" for layer in (0, 1)]
    imatrix = collect_imatrix(source, TOKENS_ST, options(5.0))
    noise = sensitivities(source, imatrix, dict.fromkeys(names, ("q4_0", "q8_0")))
    assert noise[names[1]]["q4_0"] < 1e-6 * noise[names[0]]["q4_0"]
    assert noise[names[0]]["q8_0"] < 0.02 * noise[names[0]]["q4_0"]


def test_no_target_leaves_keys_as_they_were() -> None:
    assert not {"target_bpw", "dtype", "method"} & QuantizeOptions().identity().keys()
    assert {"target_bpw", "dtype"} <= options(5.0).identity().keys()


def test_a_type_without_a_finer_one_takes_no_target() -> None:
    with pytest.raises(ValueError, match="target_bpw goes with type"):
        options(5.0, "f16")


def test_a_trained_model_loses_less_with_every_bit_and_less_than_one_type_for_all(
    shared_data: Path, tmp_path: Path
) -> None:
    source = Checkpoint.open(shared_data / "models" / "stories260k")
    text = (shared_data / "text" / "tinystories_sample.txt").read_text(encoding="utf-8")[:40_000]
    ids = source.load_tokenizer()(text, return_tensors="pt", verbose=False).input_ids[0]
    calibration, held_out = ids[: 8 * 256].view(8, 256), ids[8 * 256 :][: 16 * 256]
    reference = source.load_model(torch.float32)

    def measured(asked: QuantizeOptions) -> tuple[float, float]:
        out = tmp_path / f"{asked.type}-{asked.target_bpw}"
        report = quantize_checkpoint(source, out, asked, calibration)
        return report.bits_per_weight, divergence(
            reference, out, held_out, window=256, device="cpu"
        ).divergence

    (few, most), (many, least) = (measured(options(None, type)) for type in ("q4_0", "q8_0"))
    found = [measured(options(target, "q4_0")) for target in (7.6, 8.2, 9.0)]
    assert [most, *(lost for _, lost in found), least] == sorted(
        [most, *(lost for _, lost in found), least], reverse=True
    )
    for bits, lost in found:  # against as many matrices in 8 bits, whichever they are
        assert lost < 0.9 * (most + (least - most) * (bits - few) / (many - few))


@pytest.mark.parametrize("width", [96, 128])
def test_experts_are_q4_0_where_q4_0_64_is_asked_unless_an_override_names_them(
    tmp_path: Path, width: int
) -> None:
    checkpoint = Checkpoint.open(tiny_moe_checkpoint(tmp_path, "qwen3_moe", moe_intermediate_size=width))
    experts = {
        planned.name: planned
        for planned in plan_types(checkpoint, options(None))
        if planned.name.startswith("model.layers.0.mlp.experts.")
    }
    assert {planned.type for planned in experts.values()} == {"q4_0"}
    assert all("become zeros" in str(planned.fallback) for planned in experts.values())
    named = plan_types(checkpoint, options(None, overrides={"*.layers.0.mlp.experts.*": "q4_0_64"}))
    types = {planned.type for planned in named if planned.name in experts}
    assert types == ({"q4_0_64"} if width % 64 == 0 else {"q4_0_64", "q8_0"})


def test_routers_gates_and_corrections_stay_float32(tmp_path: Path) -> None:
    for model_type in ("qwen2_moe", "deepseek_v3"):
        checkpoint = Checkpoint.open(tiny_moe_checkpoint(tmp_path / model_type, model_type))
        plan = plan_types(checkpoint, options(None, "q4_0", overrides={"*": "q8_0"}))
        exact = ("mlp.gate.weight", "shared_expert_gate.weight", "e_score_correction_bias")
        kept = [planned for planned in plan if planned.name.endswith(exact)]
        assert kept
        assert {(planned.type, planned.fallback) for planned in kept} == {("f32", None)}


@pytest.mark.parametrize(("asked", "type"), [("q4_0", "f16"), ("q8_0", "f16"), ("bf16", "bf16")])
def test_what_llama_cpp_reads_transposed_is_a_float(tmp_path: Path, asked: BlockType, type: str) -> None:
    checkpoint = Checkpoint.open(tiny_moe_checkpoint(tmp_path, "deepseek_v2"))
    latent = [
        planned for planned in plan_types(checkpoint, options(None, asked)) if "kv_b_proj" in planned.name
    ]
    assert [planned.type for planned in latent] == [type] * 3
    assert all(("transposed" in str(planned.fallback)) == (type != asked) for planned in latent)


def of_large_vocabulary(folder: Path, *, tied: bool = False) -> Checkpoint:
    """A tiny openPangu with the vocabulary of the 7B model, without its weights."""
    config = read_json(tiny_checkpoint(folder, "PanguEmbedded", hidden=128) / "config.json")
    config |= {"vocab_size": 153_376, "tie_word_embeddings": tied}
    family = FAMILIES["PanguEmbedded"]
    tensors = {
        name: TensorInfo("model.safetensors", torch.float32, family.shape(config, placed.weight), 0)
        for name, placed in family.names(config).items()
    }
    return Checkpoint(folder, config, family, tensors)


@pytest.mark.parametrize("tied", [False, True])
def test_a_matrix_that_an_ascend_card_would_compute_wrongly_is_q8_0_unless_another_type_is_asked_for(
    tmp_path: Path, tied: bool
) -> None:
    checkpoint = of_large_vocabulary(tmp_path, tied=tied)

    def types(**asked: Any) -> dict[str, str]:
        return {planned.name: planned.type for planned in plan_types(checkpoint, QuantizeOptions(**asked))}

    embedding = "model.embed_tokens.weight"
    head = embedding if tied else "lm_head.weight"
    assert {name for name, type in types().items() if type == "q8_0"} == {head}
    assert types(overrides={head: "q4_0_64"})[head] == "q4_0_64"
    assert types(**{"embedding_type" if tied else "output_type": "f16"})[head] == "f16"
    assert types(type="q4_0")[head] == "q4_0"
    (note,) = notable_types(checkpoint, QuantizeOptions())
    assert note.startswith(f"{head} is q8_0: ")
    assert "more than 65,535 rows wrongly, and there are 153,376" in note


def test_what_an_ascend_card_would_compute_wrongly_or_not_at_all_is_said(tmp_path: Path) -> None:
    checkpoint = of_large_vocabulary(tmp_path)
    asked = QuantizeOptions(overrides={"lm_head.weight": "q4_0_64", "*.0.self_attn.o_proj.weight": "bf16"})
    slow, wrong = sorted(concerns(checkpoint, plan_types(checkpoint, asked)), reverse=True)
    assert slow.startswith("model.layers.0.self_attn.o_proj.weight is bf16: llama.cpp does not multiply")
    assert wrong.startswith("lm_head.weight is q4_0_64, which the GGUF holds as q4_0 of the same numbers: ")
    assert notable_types(checkpoint, asked) == concerns(checkpoint, plan_types(checkpoint, asked))
    other = asked.model_copy(update={"type": "q8_0", "overrides": {"*.0.self_attn.o_proj.weight": "bf16"}})
    assert notable_types(checkpoint, other) == []  # it is for no card


def test_no_mixture_for_ascend_cards_holds_bf16(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, ffn=256, dtype=torch.bfloat16))
    tokens_ST = TOKENS_ST[:1]
    imatrix = collect_imatrix(checkpoint, tokens_ST, options(13.0))
    for type, finest in (("q4_0_64", "f16"), ("q4_0", "bf16")):
        chosen = choose_types(checkpoint, options(13.0, type), imatrix)
        assert {"f16", "bf16"} & set(chosen.overrides.values()) == {finest}


def test_thousands_of_experts_are_planned_in_linear_time(tmp_path: Path) -> None:
    config = {**read_json(tiny_moe_checkpoint(tmp_path, "qwen3_moe") / "config.json"), "num_experts": 64}
    family = FAMILIES["qwen3_moe"]
    config |= {"num_hidden_layers": 48}
    tensors = {
        name: TensorInfo("model.safetensors", torch.float32, family.shape(config, placed.weight), 0)
        for name, placed in family.names(config).items()
    }
    checkpoint = Checkpoint(tmp_path, config, family, tensors)
    experts = [name for name in tensors if ".experts." in name]
    assert len(experts) == 48 * 64 * 3
    begun = process_time()
    plan = plan_types(checkpoint, options(None, "q4_0", overrides=dict.fromkeys(experts, "q8_0")))
    assert process_time() - begun < 10  # every pattern tried on every name takes minutes
    assert sum(planned.type == "q8_0" for planned in plan) == len(experts)
