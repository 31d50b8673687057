"""Texts as they come from a dataset, before they become tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Documents:
    """The texts of one part of a dataset, and how windows of tokens are taken from them."""

    texts: Sequence[str]
    """The documents, in the dataset's order."""
    joiner: str
    """What stands between two documents where they are read as one text."""
    source: str
    """What this is and where it came from, for people: goes into reports and error messages."""
    strategy: Literal["joined", "documents"] = "joined"
    """`joined`: windows of the joined text. `documents`: each window within one document that is long enough."""

    @property
    def joined(self) -> str:
        """All documents as one text."""
        return self.joiner.join(self.texts)
