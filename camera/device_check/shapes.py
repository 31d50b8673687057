"""The shapes that are measured, and how much of them."""

from dataclasses import dataclass, replace
from typing import Any

from camera.options import CheckOptions


@dataclass(frozen=True)
class Shapes:
    """openPangu-7B's, unless a field says otherwise."""

    hidden: int = 4096
    ffn: int = 12_800
    pruned_ffn: int = 10_240
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 153_376
    layers: int = 34
    """That decode."""
    walk_layers: int = 2
    """That are pruned."""
    walk_vocab: int = 153_376
    samples: int = 64
    """Of calibration text, and how many tokens each has."""
    length: int = 2048
    batch: int = 8
    prompt: int = 4
    """Tokens of the prompt, and tokens decoded after it."""
    decode: int = 128
    repeats: int = 3
    launches: int = 2000
    """Queued together, to time one."""
    copied_bytes: int = 4 << 30

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of what a token is multiplied with, joined where matrices share their input, by name."""
        query_key_value = self.hidden + 2 * self.hidden * self.kv_heads // self.heads
        found = {"qkv": (query_key_value, self.hidden), "out": (self.hidden, self.hidden)}
        for label, width in (("", self.ffn), (", pruned", self.pruned_ffn)):
            found[f"gate and up{label}"] = 2 * width, self.hidden
            found[f"down{label}"] = self.hidden, width
        found["head"] = self.vocab, self.hidden
        return found

    def weights(self, layers: int, *, pruned: bool) -> int:
        """Of a whole model, norms and biases apart."""
        narrow = (
            "qkv",
            "out",
            *(f"{name}{', pruned' if pruned else ''}" for name in ("gate and up", "down")),
        )
        layer = sum(rows * columns for rows, columns in (self.matrices[name] for name in narrow))
        return layers * layer + 2 * self.vocab * self.hidden

    def sizes(self, layers: int, ffn: int | None = None) -> dict[str, Any]:
        """For `camera.checkpoints.synthetic.write_checkpoint`."""
        return {
            "layers": layers,
            "hidden": self.hidden,
            "ffn": ffn or self.ffn,
            "vocab": self.vocab,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
        }


_LESS: dict[str, Any] = {
    "layers": 4,
    "samples": 16,
    "length": 512,
    "decode": 32,
    "repeats": 2,
    "walk_vocab": 4096,
}
_ON_CPU: dict[str, Any] = {
    "layers": 2,
    "samples": 2,
    "length": 128,
    "decode": 16,
    "walk_vocab": 4096,
    "copied_bytes": 1 << 30,
}
_TINY = Shapes(
    *(128, 320, 256, 2, 1, 320),
    layers=2,
    walk_vocab=320,
    samples=4,
    length=32,
    batch=2,
    decode=4,
    repeats=1,
    launches=50,
    copied_bytes=16 << 20,
)


def shapes_of(options: CheckOptions) -> Shapes:
    """What is measured for some options: a CPU takes the shapes, and less of them."""
    if options.tiny:
        return _TINY
    chosen = replace(Shapes(), **_LESS) if options.quick else Shapes()
    return replace(chosen, **_ON_CPU) if options.kind == "cpu" else chosen
