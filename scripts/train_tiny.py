"""Train the tiny openPangu model that the tests, the quick start and the nightly run work on.

    python scripts/train_tiny.py --out data/models/tiny-openpangu

A real language model of about 3.6 million parameters in the file layout of openPangu-Embedded, trained from scratch on
the `train` part of the built-in dataset and measured on its `test` part. Beside the checkpoint it writes
`training_log.csv` and `training.json`. The same seed, threads, Python and torch give the same weights.
"""

import argparse
import platform
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import train_tiny_tokenizer as tiny_tokenizer
import training
import transformers

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.checkpoints.weights import INDEX_NAME
from camera.data.sets import stdlib
from camera.files import atomic_folder, write_json
from camera.models.pangu.modeling import PanguEmbeddedConfig, PanguEmbeddedForCausalLM

SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 640,
    "max_position_embeddings": 2048,
    "num_attention_heads": 6,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
}
SHARD_BYTES = 3_000_000
TOKENS_PER_STEP = 2048
SHORT, LONG = 512, 2048
BOS = 1


def config_json(vocab_size: int, eos: int) -> dict[str, Any]:
    """config.json with the keys, and their order, of the published openPangu-Embedded-7B."""
    return {
        "architectures": ["PanguEmbeddedForCausalLM"],
        "bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "pad_token_id": 0,
        "eos_token_id": eos,
        "hidden_act": "silu",
        "hidden_size": SHAPE["hidden_size"],
        "initializer_range": 0.02,
        "intermediate_size": SHAPE["intermediate_size"],
        "max_position_embeddings": SHAPE["max_position_embeddings"],
        "model_type": "PanguEmbedded",
        "num_attention_heads": SHAPE["num_attention_heads"],
        "num_hidden_layers": SHAPE["num_hidden_layers"],
        "num_key_value_heads": SHAPE["num_key_value_heads"],
        "rms_norm_eps": 1e-05,
        "rope_theta": 16000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": transformers.__version__,
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def tensors_of(model: PanguEmbeddedForCausalLM) -> dict[str, torch.Tensor]:
    """The weights in bf16, and each layer's rotary frequencies in fp32 as the published checkpoint holds them."""
    config = model.config
    theta = config_json(0, 0)["rope_theta"]
    inverse = 1.0 / theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    tensors = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    for layer in range(config.num_hidden_layers):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = inverse.clone()
    return tensors


def write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Shards of about SHARD_BYTES in layer order, and their index."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in sorted(tensors.items(), key=lambda item: _layer_order(item[0])):
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(folder / file, shard)
        places.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        folder / INDEX_NAME,
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))},
    )


def _layer_order(name: str) -> tuple[int, int, str]:
    """Sort key: embedding, decoder layers by number, final norm and head."""
    if name.startswith("model.layers."):
        return 1, int(name.split(".")[2]), name
    return (0 if "embed" in name else 2), 0, name


def write_generation_config(folder: Path, eos: int) -> None:
    """generation_config.json with the keys of the published one."""
    write_json(
        folder / "generation_config.json",
        {
            "_from_model_config": True,
            "do_sample": True,
            "bos_token_id": BOS,
            "pad_token_id": 0,
            "eos_token_id": eos,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 0.8,
            "transformers_version": transformers.__version__,
        },
    )


def measure(folder: Path, train_ids: np.ndarray, test_ids: np.ndarray) -> dict[str, float]:
    """Held-out perplexity of what was written, loaded as a user would, and of the two baselines."""
    checkpoint = Checkpoint.open(folder)
    checkpoint.check_shapes()
    model = checkpoint.load_model(torch.float32)
    tokens = torch.from_numpy(test_ids)
    vocab_size = checkpoint.config["vocab_size"]
    return {
        f"model_window_{LONG}": training.perplexity(model, tokens, LONG),
        f"model_window_{SHORT}": training.perplexity(model, tokens, SHORT),
        "unigram": training.unigram_perplexity(train_ids, test_ids, vocab_size),
        "bigram": training.bigram_perplexity(train_ids, test_ids, vocab_size),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, into a folder that appears only when it is whole. Returns the content of training.json."""
    training.make_repeatable(arguments)
    train_texts, test_text = stdlib.read("train").texts, stdlib.read("test").joined
    with atomic_folder(arguments.out) as folder:
        processor = tiny_tokenizer.write(folder, tiny_tokenizer.train(train_texts))
        eos = processor.piece_to_id("[unused10]")
        config = config_json(processor.get_piece_size(), eos)
        write_json(folder / "config.json", config)
        write_generation_config(folder, eos)
        train_ids = np.array(processor.encode("\n\n".join(train_texts)), dtype=np.int64)
        test_ids = np.array(processor.encode(test_text), dtype=np.int64)
        model = PanguEmbeddedForCausalLM(PanguEmbeddedConfig.from_pretrained(folder)).float().train()
        record = training.train(
            model,
            lambda length, random: training.windows(train_texts, processor.encode, length, random, BOS),
            (len(train_ids), torch.from_numpy(test_ids)),
            (TOKENS_PER_STEP, SHORT, LONG),
            arguments,
            folder,
        )
        write_weights(folder, tensors_of(model))
        record |= {
            "peak_learning_rate": arguments.lr,
            "weight_decay": arguments.weight_decay,
            "held_out_perplexity": measure(folder, train_ids, test_ids),
            "dataset": stdlib.read("train").source,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "sentencepiece": sentencepiece.__version__,
            },
        }
        write_json(folder / "training.json", record)
    return record


def main() -> None:
    """The command."""
    parser = training.parser_of(__doc__, steps=2000, threads=2, rate=2e-3)
    print(run(parser.parse_args())["held_out_perplexity"])


if __name__ == "__main__":
    main()
