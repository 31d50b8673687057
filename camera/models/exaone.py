"""EXAONE 4.0 (1.2B, 32B): norms behind attention and feed-forward part and none before; in the large one three layers of
four see a window, and the fourth knows no positions."""

from camera.models.experts import Config
from camera.models.family import FAMILIES, Family
from camera.models.gguf import GgufRules, Window
from camera.models.weights import HEAD_NORMS, attention_weights, decoder, dense_weights, post_norms

_WITH_WINDOWS = 64


def _refuses(config: Config) -> str | None:
    layers = int(config["num_hidden_layers"])
    if (layers == _WITH_WINDOWS) == bool(config.get("sliding_window")):
        return None
    return (
        f"it takes a model of {_WITH_WINDOWS} layers, and no other, for one with sliding windows, and this has {layers} "
        f"layers and sliding_window {config.get('sliding_window')}"
    )


FAMILIES.register(
    "exaone4",
    Family(
        model_type="exaone4",
        architecture="Exaone4ForCausalLM",
        gguf_architecture="exaone4",
        weights=decoder(*attention_weights({}, norms=HEAD_NORMS, before=()), *post_norms(), *dense_weights()),
        left_out=("sliding_window", "layer_types"),
        gguf_rules=GgufRules(
            window=Window(4, assumed=lambda layers: 4096 if layers == _WITH_WINDOWS else 0), refuses=_refuses
        ),
    ),
)
