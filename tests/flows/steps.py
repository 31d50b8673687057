"""The steps of the small recipes that the tests run, in order."""

STEPS = [
    "fetch calibration",
    "capture",
    "score",
    "prune",
    "save",
    "quantize",
    "convert",
    "quantize baseline",
    "convert baseline",
    "fetch held-out",
    "evaluate original held-out",
    "evaluate baseline held-out",
    "evaluate pruned held-out",
    "evaluate pruned+quantized held-out",
    "benchmark",
    "report",
    "publish",
]
