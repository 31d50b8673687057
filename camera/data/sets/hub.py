"""WikiText-2 and C4 from the Hugging Face hub, at pinned revisions, as the GPTQ line of work reads them."""

from dataclasses import dataclass, field
from typing import Any

from camera.data.sets import DATA_SETS, DataSet, Documents, Strategy
from camera.data.sets.copies import rows_of_copy
from camera.errors import CameraError, NetworkError
from camera.hub_client import set_timeouts
from camera.options import DatasetOptions


@dataclass(frozen=True)
class HubDataset(DataSet):
    """One data set of the hub, and which of its parts stand for `train` and `test`."""

    repository: str
    revision: str
    """The commit that is read unless the options name another."""
    splits: dict[str, str]
    """By `train` and `test`: the data set's own name of the part."""
    config: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    """By the data set's name of the part: the one file that is read of it; all files if empty."""
    joiner: str = "\n\n"
    strategy: Strategy = "joined"
    test_windows: int | None = None
    takes_path: bool = True
    """A local copy, for machines without a network."""

    def identity(self, options: DatasetOptions) -> dict[str, Any]:
        """The commit; a local copy is told by its content."""
        if options.path is not None:
            return {}
        return {"revision": options.revision or self.revision}

    def read(self, options: DatasetOptions) -> Documents:
        """From a local copy, else from the cache or the hub.

        Raises:
            NetworkError: if the hub does not answer and the cache does not hold the data set.
            CameraError: if the hub has no such data set, file or revision.
        """
        revision = options.revision or self.revision
        part = self.splits[options.split]
        if options.path is not None:
            within, by_line = self.files.get(part, self.config), self.strategy == "joined"
            texts = rows_of_copy(options.path, part, within=within, field=options.field, by_line=by_line)
            return Documents(texts, self.joiner, str(options.path), self.strategy)
        # A column that reads rows as they are asked for: one part of C4 is 800 MB.
        texts = self._load(part, revision)["text"]
        name = f"{self.repository} {self.config}" if self.config else self.repository
        return Documents(texts, self.joiner, f"{name}, {part} part, revision {revision}", self.strategy)

    def _load(self, part: str, revision: str) -> Any:
        import datasets  # slow to import, and needed for hub datasets only
        from huggingface_hub.errors import HfHubHTTPError

        set_timeouts()

        files = {part: self.files[part]} if self.files else None
        try:
            return datasets.load_dataset(
                self.repository, self.config, data_files=files, revision=revision, split=part
            )
        except (
            datasets.exceptions.DatasetNotFoundError,
            datasets.exceptions.DataFilesNotFoundError,
        ) as error:
            raise CameraError(
                f"the hub has no {self.repository} at revision {revision}: check `revision` ({error})"
            ) from error
        except (ConnectionError, TimeoutError, HfHubHTTPError) as error:
            raise NetworkError(
                f"{self.repository} could not be fetched ({error}). Without a network, point HF_HOME at a cache that "
                "holds it, or give the `path` of a local copy beside its name"
            ) from error
        except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
            raise CameraError(f"{self.repository} at revision {revision} cannot be read: {error}") from error


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
DATA_SETS.register("wikitext2", WIKITEXT2)
DATA_SETS.register("c4", C4)
