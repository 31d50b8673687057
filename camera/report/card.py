"""The model card: README.md of a saved or published folder, as the Hugging Face hub reads it."""

import re
from collections import Counter
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from camera.checkpoints.checkpoint import Checkpoint
from camera.files import atomic_file, read_json
from camera.formats.gguf_parser import TWIN_KEY
from camera.formats.gguf_reader import GgufFile, is_q4_0_64, open_gguf
from camera.held import opened
from camera.pruning.summary import SUMMARY
from camera.registry import BLOCK_FORMATS, PRUNING_METHODS
from camera.report.schema import Results
from camera.report.table import results_markdown
from camera.report.templates import render
from camera.report.words import verdict
from camera.results import Result
from camera.yaml_text import parse_yaml

CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MOST_OF_README = 1 << 20
_FRONT = re.compile(r"---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
_LICENSE_KEYS = ("license", "license_name", "license_link")


class GgufFact(Result):
    """A GGUF file that lies beside the card."""

    file: str
    type: str
    """That the file declares."""
    stock: bool = True
    """Whether a stock llama.cpp may be given it: not where any tensor is Q4_0_64."""
    twin_of: str | None = None
    """For a lossless copy: the type whose numbers it holds."""


class CardFacts(Result):
    """What a card says besides the results."""

    name: str
    base_model: str
    """A hub id, or the name or path of a folder (of a path, the card shows the last part only)."""
    model_type: str
    """`model_type` of config.json."""
    prune: dict[str, Any]
    """What `prune.json` holds."""
    license: str | None = None
    """As in the front matter of the source's README."""
    license_name: str | None = None
    license_link: str | None = None
    remote_code: bool = False
    """Whether the folder carries Python code of the source."""
    lineage: bool = False
    """Whether lineage.json lies beside the card."""
    gguf: tuple[GgufFact, ...] = Field(default_factory=tuple)


def render_card(facts: CardFacts, results: Results | None = None) -> str:
    """The card's text: YAML front matter, then Markdown."""
    return render(
        "card.md.j2",
        facts=facts,
        base=facts.base_model if _HUB_ID.fullmatch(facts.base_model) else Path(facts.base_model).name,
        front=_front_matter(facts),
        results=results,
        verdict=None if results is None else verdict(results),
        tables=None if results is None else results_markdown(results),
        stock=_transformers_knows(facts.model_type),
        found_with=PRUNING_METHODS[facts.prune["method"]].title,
        decisions=facts.prune.get("decisions", ()),
    )


def write_card(
    folder: Path,
    source: Checkpoint,
    pruned: Path,
    *,
    base_model: str,
    results: Results | None = None,
    name: str | None = None,
    lineage: bool = False,
) -> None:
    """Write `README.md` into a model's folder; one that is there is replaced, its licence kept.

    Args:
        folder: a checkpoint, with or without GGUF files beside it.
        source: the checkpoint whose README may state a licence: the original, or the folder itself.
        pruned: what `prune` wrote.
        base_model: as in the recipe.
        results: of the run, if they are known yet.
        name: of the model; the default is made of the base model's.
        lineage: whether lineage.json will lie beside it.

    Raises:
        CameraError: if the prune summary is missing, or a GGUF file is damaged.
    """
    facts = CardFacts(
        name=name or f"{Path(base_model).name}-camera",
        base_model=base_model,
        model_type=str(source.config.get("model_type", "")),
        prune=read_json(pruned / SUMMARY),
        remote_code=any(file.endswith(".py") for file in source.side_files),
        lineage=lineage,
        gguf=tuple(_gguf_fact(open_gguf(path)) for path in sorted(folder.glob("*.gguf"))),
        **source_license(source.folder),
    )
    with atomic_file(folder / CARD) as temporary:
        temporary.write_text(render_card(facts, results), encoding="utf-8")


def source_license(folder: Path) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of the front matter of a folder's README, as far as it has them."""
    path = folder / CARD
    text = ""
    if path.is_file():
        with opened(path) as file:
            text = file.read(_MOST_OF_README).decode("utf-8", errors="replace")
    try:
        front = parse_yaml(found[1]) if (found := _FRONT.match(text)) is not None else None
    except ValueError:
        return {}  # someone else's README: a card without a licence is better than no model
    if not isinstance(front, Mapping):
        return {}
    stated = ((key, front.get(key)) for key in _LICENSE_KEYS)
    return {key: value for key, value in stated if isinstance(value, str) and value}


def _front_matter(facts: CardFacts) -> str:
    front: dict[str, Any] = {}
    if _HUB_ID.fullmatch(facts.base_model):  # the hub refuses a card whose base model is no hub id
        front["base_model"] = facts.base_model
    front |= {key: value for key in _LICENSE_KEYS if (value := getattr(facts, key)) is not None}
    front |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "camera", "ascend", *(["gguf"] if facts.gguf else [])],
    }
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def _transformers_knows(model_type: str) -> bool:
    """Whether transformers has the architecture itself, whatever was registered in this process."""
    # By name, for it is not exported; here, because transformers takes long to import.
    known = import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES
    return model_type in known


def _gguf_fact(file: GgufFile) -> GgufFact:
    bytes_of: Counter[str] = Counter()
    for tensor in file.tensors.values():
        bytes_of[tensor.type] += tensor.size_bytes
    number, twin_of = file.metadata.get("general.file_type"), file.metadata.get(TWIN_KEY)
    declared = [
        name for name in bytes_of if name in BLOCK_FORMATS and BLOCK_FORMATS[name].file_number == number
    ]
    return GgufFact(
        file=file.path.name,
        type=(declared or [max(sorted(bytes_of), key=lambda name: bytes_of[name])])[0],
        stock=not is_q4_0_64(file),
        twin_of=None if twin_of is None else str(twin_of),
    )
