"""Granite dense (3.0 to 3.3, 2B and 8B): a Llama that multiplies embedding, scores, branches and logits by numbers of its own."""

from camera.models.family import FAMILIES, Family
from camera.models.gguf import GgufRules, Stated
from camera.models.scales import Scales
from camera.models.weight import ATTENTION, When
from camera.models.weights import decoder_weights

FAMILIES.register(
    "granite",
    Family(
        model_type="granite",
        architecture="GraniteForCausalLM",
        gguf_architecture="granite",
        weights=decoder_weights(dict.fromkeys(ATTENTION, When("attention_bias", default=False))),
        permutes_rotary=True,
        scales=Scales(
            embedding=lambda config: float(config.get("embedding_multiplier", 1.0)),
            branch=lambda config: float(config.get("residual_multiplier", 1.0)),
            logits=lambda config: 1 / float(config.get("logits_scaling", 1.0)),
        ),
        gguf_rules=GgufRules(
            stated=(
                Stated("attention.scale", "attention_multiplier", 1.0),
                Stated("embedding_scale", "embedding_multiplier", 1.0),
                Stated("residual_scale", "residual_multiplier", 1.0),
                Stated("logit_scale", "logits_scaling", 1.0),
            )
        ),
    ),
)
