"""Results as the report's stage wrote them. Reading them brings no torch, so that who only looks starts at once."""

from pathlib import Path

from pydantic import ValidationError

from camera.errors import CameraError
from camera.files import read_json
from camera.report.schema import Results


def read_results(path: Path) -> Results:
    """Read a `results.json`.

    Raises:
        CameraError: if it is missing, or is not one.
    """
    try:
        return Results.model_validate(read_json(path))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise CameraError(
            f"{path} is no results.json of this version ({where}): make the report again"
        ) from None
