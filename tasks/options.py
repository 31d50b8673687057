"""The sections of options that a step is asked with."""

from typing import Any, TypeVar

from camera.options import Options

Section = TypeVar("Section", bound=Options)


class Sections(dict[str, Options]):
    """Sections of options by name: `Sections(capture=CaptureOptions())`."""

    def of(self, kind: type[Section]) -> Section:
        """The section of this type.

        Raises:
            KeyError: if there is none.
        """
        for section in self.values():
            if isinstance(section, kind):
                return section
        raise KeyError(kind.__name__)

    def identity(self) -> dict[str, Any]:
        """What of every section decides the result, as JSON has it."""
        return {name: section.identity() for name, section in self.items()}
