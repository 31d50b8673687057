"""OLMoE (1B-7B): every layer has experts; query and key are normed over all heads together."""

from camera.models.experts import Config, Experts
from camera.models.family import FAMILIES, Family
from camera.models.gguf import Fixed, GgufRules, normalised
from camera.models.weight import ATTENTION, When
from camera.models.weights import FFN_NORM, NORMS_OF_ALL_HEADS, attention_weights, decoder, expert_weights


def _refuses(config: Config) -> str | None:
    if config.get("num_key_value_heads") in (None, config["num_attention_heads"]):
        return None
    return "there are fewer key-value heads than heads, and it norms keys over the width of the model"


FAMILIES.register(
    "olmoe",
    Family(
        model_type="olmoe",
        architecture="OlmoeForCausalLM",
        gguf_architecture="olmoe",
        weights=decoder(
            *attention_weights(
                dict.fromkeys(ATTENTION, When("attention_bias", default=False)),
                norms=NORMS_OF_ALL_HEADS,
            ),
            FFN_NORM,
            *expert_weights("intermediate_size"),
        ),
        experts=Experts(
            count_keys=("num_experts", "num_local_experts"),
            chosen_keys=("num_experts_per_tok",),
            width_key="intermediate_size",
        ),
        gguf_rules=GgufRules(
            own_head=True,
            refuses=_refuses,
            fixed=(
                normalised(graph=False, default=False),
                Fixed(
                    "clip_qkv",
                    value=None,
                    default=None,
                    otherwise="llama.cpp does not clip query, key and value (clip_qkv): its logits will differ",
                ),
            ),
        ),
    ),
)
