"""The readers that are fuzzed, apart from what reads them: atheris must see those modules imported."""

NAMES = [
    *("safetensors", "config", "tokenizer", "pieces", "quantized", "gguf"),
    *("imatrix", "jsonl", "parquet", "readme", "recipe", "lineage"),
]
