"""SmolLM3: a Llama in which every fourth layer knows no positions. (SmolLM and SmolLM2 are Llamas by their config.)"""

from camera.models.experts import Config
from camera.models.family import FAMILIES, Family
from camera.models.gguf import GgufRules
from camera.models.weight import ATTENTION, When
from camera.models.weights import decoder_weights

_STEP = 4


def _refuses(config: Config) -> str | None:
    layers = int(config["num_hidden_layers"])
    if config["no_rope_layers"][:layers] == [int((layer + 1) % _STEP != 0) for layer in range(layers)]:
        return None
    return f"no_rope_layers names others than every {_STEP}th layer, and it turns queries and keys in all but those"


FAMILIES.register(
    "smollm3",
    Family(
        model_type="smollm3",
        architecture="SmolLM3ForCausalLM",
        gguf_architecture="smollm3",
        weights=decoder_weights(dict.fromkeys(ATTENTION, When("attention_bias", default=False))),
        permutes_rotary=True,
        left_out=("no_rope_layers", "rope_parameters", "tie_word_embeddings"),
        gguf_rules=GgufRules(refuses=_refuses, config={"no_rope_layer_interval": _STEP}),
        refuses=lambda config: (
            "mlp_bias: feed-forward layers with biases are not supported" if config.get("mlp_bias") else None
        ),
    ),
)
