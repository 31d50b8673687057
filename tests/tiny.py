"""Tiny random checkpoints of every supported family, complete with a tokenizer that works."""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from camera.checkpoints.safetensors_file import write_tensors
from camera.checkpoints.weights import INDEX_NAME, SINGLE_NAME

TOKENS = 352
"""Tokens of the tiny tokenizers; an embedding may have more rows."""
MODEL_TYPES = ("llama", "qwen2", "qwen3", "PanguEmbedded")
_DENSE: dict[str, dict[str, Any]] = {
    "mistral": {"head_dim": 32, "sliding_window": None},
    "internlm3": {"head_dim": 16},
    "smollm3": {"num_hidden_layers": 4},
    "seed_oss": {"head_dim": 16},
    "ernie4_5": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "granite": {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.22,
        "logits_scaling": 0.5,
    },
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "olmo2": {},
    "phi3": {"partial_rotary_factor": 0.75},
    "glm4": {"head_dim": 16, "attention_bias": True},
    "gemma": {"head_dim": 32},
    "gemma2": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}
"""What tells a tiny model of a dense family from a tiny Llama."""
DENSE_TYPES = (*MODEL_TYPES, *_DENSE)
"""Every dense family; those of `MODEL_TYPES` have the tests that would tell the others nothing new."""
ALWAYS_TIED = ("gemma", "gemma2")
"""Of which llama.cpp takes the embedding for the head."""
_OWN_WIDTH = {"intermediate_size": 192, "moe_intermediate_size": 96}
_LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
_MOE: dict[str, dict[str, Any]] = {
    "PanguProMoE": {
        **_OWN_WIDTH,
        "shared_expert_intermediate_size": 160,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "deepseek": {
        **_OWN_WIDTH,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
    },
    "deepseek_v2": {
        **_OWN_WIDTH,
        **_LATENT,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {
        **_OWN_WIDTH,
        **_LATENT,
        "q_lora_rank": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
    },
    "ernie4_5_moe": {
        **_OWN_WIDTH,
        "moe_num_experts": 8,
        "moe_num_shared_experts": 2,
        "moe_k": 3,
        "moe_layer_start_index": 1,
    },
    "glm4_moe": {
        **_OWN_WIDTH,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "attention_bias": True,
        "use_qk_norm": True,
        "routed_scaling_factor": 1.5,
    },
    "hunyuan_v1_moe": {"intermediate_size": 96, "num_experts": 8, "moe_topk": 3, "head_dim": 16},
    "mixtral": {"intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {
        "intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "num_key_value_heads": 4,
    },
    "phimoe": {
        "intermediate_size": 96,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "qwen2_moe": {
        **_OWN_WIDTH,
        "shared_expert_intermediate_size": 160,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
    },
    "qwen3_moe": {
        **_OWN_WIDTH,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "head_dim": 16,
    },
}
"""What tells a tiny model of a family from a tiny Llama."""
MOE_TYPES = tuple(_MOE)
MOE_TYPES_IN_GGUF = tuple(name for name in _MOE if name != "PanguProMoE")
"""Those that llama.cpp has an architecture for."""
_REMOTE = {"PanguProMoE": ("openpangu_moe", "PanguProMoE"), "deepseek": ("deepseek", "Deepseek")}
"""Whose published checkpoints carry code: module and start of the names of its classes."""
_SENTENCEPIECE = (
    "llama",
    "PanguEmbedded",
    "PanguProMoE",
    "mixtral",
    "phimoe",
    "ernie4_5_moe",
    "mistral",
    "internlm3",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3_text",
)

QWEN2_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How the tokenizers of Qwen2 and Qwen3 split text into words."""
_TEXT = """\
The old lighthouse keeper climbed the narrow stairs each evening to light the great lamp above the sea.
Ships far away would see the bright signal and turn before they reached the rocks under the water.
One night a storm came from the north, and the wind pushed hard against the windows of the tower.
He counted 12 ships, then 34, then 56, and wrote the numbers in his book: 7, 8, 9, 0.
"Will they all come home?" asked the girl; "they will," he said, "if the light keeps burning."
In the morning the water was quiet, the sky was clear, and every boat had found its harbour again.
Zebras, quails, foxes, jackdaws and vixens don't live by the sea, but (so he said) gulls & crabs do!
系统：你好。助手：用户：工具：
"""
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '[unused9]' + message['role'] + ': ' + message['content'] + '[unused10]' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[unused9]assistant: ' }}{% endif %}"
)


def tiny_checkpoint(
    folder: Path,
    model_type: str = "llama",
    *,
    hidden: int = 64,
    ffn: int = 192,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = TOKENS,
    tied: bool = False,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **more: Any,
) -> Path:
    """Write a Hugging Face folder with random weights: config, safetensors, tokenizer, generation config.

    Biases and norms are random too, so that a mix-up of two tensors changes the logits. A PanguEmbedded
    checkpoint also holds the `inv_freq` buffers that the published ones hold.

    Args:
        folder: made if it is missing.
        model_type: one of DENSE_TYPES.
        hidden, ffn, layers, heads, kv_heads: the model's sizes; `hidden` is divisible by `heads`.
        vocab: rows of the embedding, at least TOKENS; the rest is padding.
        tied: whether the output head is the embedding.
        shards: 1 writes model.safetensors, more write an index and so many files.
        dtype: of the weights.
        seed: of the weights.
        more: further keys of config.json, in place of the usual ones.

    Returns:
        `folder`.
    """
    from transformers import AutoConfig

    assert vocab >= TOKENS, f"the tokenizer has {TOKENS} tokens"
    pangu = model_type == "PanguEmbedded"
    sizes = {
        **_common(hidden, layers, heads, kv_heads, vocab, tied),
        "intermediate_size": ffn,
    }
    if model_type == "qwen3":
        sizes["head_dim"] = hidden // heads
    options: dict[str, Any] = {"attention_bias": True} if pangu else {}
    sizes |= _DENSE.get(model_type, {}) | more
    layers = sizes["num_hidden_layers"]
    config = AutoConfig.for_model("llama" if pangu else model_type, **sizes, **options)
    model = _random_model(config, seed)
    tensors = {name: value.to(dtype).contiguous() for name, value in model.state_dict().items()}
    if tied:
        del tensors["lm_head.weight"]

    folder.mkdir(parents=True, exist_ok=True)
    dtype_name = str(dtype).removeprefix("torch.")
    if pangu:
        rates = 1.0 / 16e6 ** (torch.arange(0, hidden // heads, 2) / (hidden // heads))
        for layer in range(layers):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = rates.float().clone()
        _write_json(folder / "config.json", _pangu_config(sizes, dtype_name))
    else:
        config.architectures = [type(model).__name__]
        config.dtype = dtype_name
        config.save_pretrained(folder)
    _write_the_rest(folder, model_type, tensors, shards)
    return folder


def tiny_moe_checkpoint(
    folder: Path,
    model_type: str = "qwen3_moe",
    *,
    layers: int = 3,
    tied: bool = False,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vocab: int = TOKENS,
    predicting: bool = False,
    **options: Any,
) -> Path:
    """Write a folder of a mixture of experts, as it is published: one tensor for each matrix of each expert.

    Hidden size 64, 8 experts of 96 channels; the first of the layers is dense where published ones are, there is a shared
    expert where the family knows one, and what the family keeps in float32 is in float32. Norms, biases and corrections
    are random too.

    Args:
        folder: made if it is missing.
        model_type: one of MOE_TYPES.
        layers, tied, shards, dtype, seed, vocab: as of `tiny_checkpoint`.
        predicting: whether there is also a layer that predicts the token after the next, in a family that has such.
        options: further keys of config.json, in place of the usual ones.

    Returns:
        `folder`.
    """
    from transformers import AutoConfig

    from camera.models import FAMILIES

    FAMILIES[model_type].register()
    keys = {**_common(64, layers, 4, 2, vocab, tied), **_MOE[model_type], **options}
    config = AutoConfig.for_model(model_type, **keys)
    model = _random_model(config, seed)
    model.save_pretrained(folder)  # splits what transformers holds of all experts together
    exact = [*(model._keep_in_fp32_modules_strict or ()), *(model._keep_in_fp32_modules or ())]
    tensors = {
        name: tensor if any(part in name for part in exact) else tensor.to(dtype)
        for name, tensor in load_file(folder / SINGLE_NAME).items()
    }
    (folder / SINGLE_NAME).unlink()
    if predicting:
        tensors |= _predicting_layer(model_type, layers, tensors)
        keys["num_nextn_predict_layers"] = 1
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8")) | keys
    if "num_local_experts" not in keys:
        saved.pop(
            "num_local_experts", None
        )  # transformers' name for what the published config calls otherwise
    if model_type in _REMOTE:
        saved["auto_map"] = _auto_map(*_REMOTE[model_type])
    _write_json(folder / "config.json", {**saved, "dtype": str(dtype).removeprefix("torch.")})
    _write_the_rest(folder, model_type, tensors, shards)
    return folder


def _predicting_layer(
    model_type: str, layers: int, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What published checkpoints hold of it, after the last layer or beside the layers."""
    ernie = model_type == "ernie4_5_moe"
    last, behind = f"model.layers.{layers - 1}.", "model.mtp_block.0." if ernie else f"model.layers.{layers}."
    found = {
        name.replace(last, behind): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(last)
    }
    norm, both = tensors["model.norm.weight"], torch.ones(64, 128, dtype=tensors["model.norm.weight"].dtype)
    if ernie:
        names = (
            "model.mtp_emb_norm.0.weight",
            "model.mtp_hidden_norm.0.weight",
            "model.mtp_linear_proj.0.weight",
        )
    else:
        names = (f"{behind}enorm.weight", f"{behind}hnorm.weight", f"{behind}eh_proj.weight")
    return found | dict(zip(names, (norm.clone(), norm.clone(), both), strict=True))


def _common(hidden: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    }


def _random_model(config: Any, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, tensor in model.state_dict().items():
            if "correction" in name or "router_scale" in name:
                torch.nn.init.uniform_(tensor, 0.0, 0.3)
            elif tensor.dim() == 1:
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
            elif not tensor.any():  # a router; in some families it starts with zeros
                torch.nn.init.normal_(tensor, std=0.2)
    return model.eval()


def _write_the_rest(folder: Path, model_type: str, tensors: dict[str, torch.Tensor], shards: int) -> None:
    _write_json(
        folder / "generation_config.json",
        {"do_sample": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    )
    _write_weights(folder, tensors, shards)
    if model_type in _SENTENCEPIECE:
        _write_sentencepiece(folder, "PanguTokenizer" if model_type.startswith("Pangu") else "LlamaTokenizer")
    else:
        _write_byte_bpe(folder)


def _pangu_config(sizes: dict[str, Any], dtype_name: str) -> dict[str, Any]:
    return {
        "architectures": ["PanguEmbeddedForCausalLM"],
        "auto_map": _auto_map("openpangu_dense", "PanguEmbedded"),
        "bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "model_type": "PanguEmbedded",
        "rope_theta": 16000000.0,
        "torch_dtype": dtype_name,
        "transformers_version": "4.53.2",
        "use_cache": True,
        **sizes,
    }


def _auto_map(module: str, name: str) -> dict[str, str]:
    """How a published config.json points at code that the checkpoint carries."""
    return {
        "AutoConfig": f"configuration_{module}.{name}Config",
        "AutoModel": f"modeling_{module}.{name}Model",
        "AutoModelForCausalLM": f"modeling_{module}.{name}ForCausalLM",
    }


def _write_weights(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        write_tensors(folder / SINGLE_NAME, tensors)
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        write_tensors(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


@cache
def _sentencepiece_model() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=TOKENS,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",  # as the published models of these families have it
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["[unused9]", "[unused10]"],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _write_sentencepiece(folder: Path, tokenizer_class: str) -> None:
    (folder / "tokenizer.model").write_bytes(_sentencepiece_model())
    contents = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "[unused9]", 4: "[unused10]"}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": tokenizer_class,
            "add_bos_token": True,
            "add_eos_token": False,
            "add_prefix_space": True,
            "legacy": False,
            "clean_up_tokenization_spaces": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
            "chat_template": _CHAT_TEMPLATE,
            "added_tokens_decoder": {
                str(number): {
                    "content": content,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for number, content in contents.items()
            },
        },
    )


@cache
def _byte_bpe_json() -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.splitlines() * 2, trainer)
    assert tokenizer.get_vocab_size() == TOKENS
    return tokenizer.to_str(pretty=False)


def _write_byte_bpe(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(_byte_bpe_json(), encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": _CHAT_TEMPLATE.replace("[unused9]", "<|im_start|>").replace(
                "[unused10]", "<|im_end|>"
            ),
        },
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
