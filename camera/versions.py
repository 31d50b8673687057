"""The versions of what computes: results depend on them, and `camera doctor` shows them."""

from importlib import metadata

PACKAGES = (
    *("torch", "torch-npu", "transformers", "safetensors", "tokenizers"),
    *("sentencepiece", "datasets", "gguf", "numpy"),
)
OPTIONAL = frozenset({"torch-npu"})


def installed(package: str) -> str | None:
    """The version of a distribution, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Of those of `PACKAGES` that are installed."""
    found = {package: installed(package) for package in PACKAGES}
    return {package: version for package, version in found.items() if version is not None}
