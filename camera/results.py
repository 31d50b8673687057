"""The base of everything that is measured or found and stored as JSON, and how it is read back."""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from camera.errors import CameraError
from camera.files import read_json


class Result(BaseModel):
    """A result that is read back as it was written: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )

    @classmethod
    def read(cls, path: Path, remedy: str) -> Self:
        """Read a JSON file.

        Args:
            path: the file.
            remedy: what to do if it does not fit, for the error message: `make the report again`.

        Raises:
            CameraError: if the file is missing, or does not hold this result.
        """
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise CameraError(
                f"{path} does not fit this version ({where}: {first['msg']}): {remedy}"
            ) from None
