"""Our GGUF files beside those of llama.cpp's own converter: tensors byte for byte, and all keys."""

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from tests.parity.conftest import FAMILIES, TYPES, Pair
from tests.parity.differences import TENSORS, unexplained

pytestmark = pytest.mark.parity


def of(pairs: dict[tuple[str, str], Pair], family: str, type: str) -> Pair:
    pair = pairs[family, type]
    assert pair.error is None, f"llama.cpp's converter gave up: {pair.error}"
    return pair


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_theirs_byte_for_byte(
    pairs: dict[tuple[str, str], Pair], family: str, type: str
) -> None:
    pair = of(pairs, family, type)
    ours, theirs = ({tensor.name: tensor for tensor in GGUFReader(path).tensors} for path in pair[:2])
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        their = theirs[name]
        if any(family == known and fnmatch(name, pattern) for known, pattern in TENSORS):
            assert tensor.n_elements == their.n_elements, name
            if tensor.tensor_type != their.tensor_type:
                continue
        else:
            assert list(tensor.shape) == list(their.shape), name
        assert tensor.tensor_type == their.tensor_type, name
        assert tensor.data.tobytes() == their.data.tobytes(), name


def keys(path: Path) -> dict[str, Any]:
    fields = GGUFReader(path).fields.values()
    return {field.name: field.contents() for field in fields if not field.name.startswith("GGUF.")}


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_theirs_but_for_differences_with_a_reason(
    pairs: dict[tuple[str, str], Pair], family: str
) -> None:
    pair = of(pairs, family, "f16")
    assert unexplained(family, keys(pair.ours), keys(pair.theirs)) == {}
