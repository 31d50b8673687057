"""WikiText-2 and C4 from the Hugging Face hub, at pinned revisions, as the GPTQ line of work reads them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from camera.data.documents import Documents
from camera.errors import CameraError, NetworkError
from camera.hub_client import set_timeouts

Split = Literal["train", "test"]


@dataclass(frozen=True)
class HubDataset:
    """One dataset of the hub, and which of its parts stand for `train` and `test`."""

    repository: str
    revision: str
    splits: dict[Split, str]
    """The dataset's own name of each part."""
    config: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    """By the dataset's name of the part: the one file that is read of it; all files if empty."""
    joiner: str = "\n\n"
    strategy: Literal["joined", "documents"] = "joined"
    test_windows: int | None = None
    """How many windows, each within a random document, stand for the test part; None: all of it, joined."""


WIKITEXT2 = HubDataset(
    repository="Salesforce/wikitext",
    revision="b08601e04326c79dfdd32d625aee71d232d685c3",
    config="wikitext-2-raw-v1",
    splits={"train": "train", "test": "test"},
)
C4 = HubDataset(
    repository="allenai/c4",
    revision="607bd4c8450a42878aa9ddc051a65a055450ef87",
    splits={"train": "train", "test": "validation"},
    files={
        "train": "en/c4-train.00000-of-01024.json.gz",
        "validation": "en/c4-validation.00000-of-00008.json.gz",
    },
    joiner=" ",
    strategy="documents",
    test_windows=256,
)
DATASETS = {"wikitext2": WIKITEXT2, "c4": C4}


def read(dataset: HubDataset, split: Split, revision: str | None = None) -> Documents:
    """One part of a dataset, from the local cache or else from the hub.

    Args:
        dataset: what to read.
        split: which part.
        revision: a commit to read instead of the pinned one.

    Raises:
        NetworkError: if the hub does not answer and the cache does not hold the dataset.
        CameraError: if the hub has no such dataset, file or revision.
    """
    revision = revision or dataset.revision
    part = dataset.splits[split]
    # A column that reads rows as they are asked for: one part of C4 is 800 MB.
    texts: Sequence[str] = _load(dataset, part, revision)["text"]
    name = f"{dataset.repository} {dataset.config}" if dataset.config else dataset.repository
    return Documents(texts, dataset.joiner, f"{name}, {part} part, revision {revision}", dataset.strategy)


def _load(dataset: HubDataset, part: str, revision: str) -> Any:
    import datasets  # slow to import, and needed for hub datasets only
    from huggingface_hub.errors import HfHubHTTPError

    set_timeouts()

    files = {part: dataset.files[part]} if dataset.files else None
    try:
        return datasets.load_dataset(
            dataset.repository, dataset.config, data_files=files, revision=revision, split=part
        )
    except (datasets.exceptions.DatasetNotFoundError, datasets.exceptions.DataFilesNotFoundError) as error:
        raise CameraError(
            f"the hub has no {dataset.repository} at revision {revision}: check `revision` ({error})"
        ) from error
    except (ConnectionError, TimeoutError, HfHubHTTPError) as error:
        raise NetworkError(
            f"{dataset.repository} could not be fetched ({error}). Without a network, point HF_HOME at a cache that "
            "holds it, or use `name: file` with the `path` of a local copy"
        ) from error
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        raise CameraError(f"{dataset.repository} at revision {revision} cannot be read: {error}") from error
