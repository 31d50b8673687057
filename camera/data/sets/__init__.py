"""Where text comes from: one module of this package for each kind of data set, registered in `DATA_SETS`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from camera.options import DatasetOptions
from camera.registry import DATA_SETS

if TYPE_CHECKING:
    import torch

__all__ = ["DATA_SETS", "DataSet", "Documents"]

Strategy = Literal["joined", "documents"]


@dataclass(frozen=True)
class Documents:
    """The texts of one part of a data set, and how windows of tokens are taken from them."""

    texts: Sequence[str]
    """The documents, in the data set's order."""
    joiner: str
    """What stands between two documents where they are read as one text."""
    source: str
    """What this is and where it came from, for people: goes into reports and error messages."""
    strategy: Strategy = "joined"
    """`joined`: windows of the joined text. `documents`: each window within one document that is long enough."""

    @property
    def joined(self) -> str:
        """All documents as one text."""
        return self.joiner.join(self.texts)


class DataSet(ABC):
    """One data set."""

    takes_path: bool = False
    """Whether `path` may say where it lies."""
    needs_path: bool = False
    """Whether it must."""
    test_windows: int | None = None
    """How many windows, each within a random document, stand for the test part; None: all of it, joined."""

    @abstractmethod
    def read(self, options: DatasetOptions) -> Documents:
        """The documents of one part.

        Raises:
            NetworkError: if it has to be fetched and no server answers.
            CameraError: if it is missing or damaged.
        """

    def identity(self, options: DatasetOptions) -> dict[str, Any]:
        """What beside the options decides the text, as plain JSON: versions, commits."""
        return {}

    def ready_windows(self, options: DatasetOptions, vocab_size: int) -> "torch.Tensor | None":
        """Windows of tokens, int64 [samples, length], of a data set that holds them in the place of text."""
        return None
