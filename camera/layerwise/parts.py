"""Finished files of an unfinished folder, by their digests: what a killed run left is used if it is what that run wrote."""

from pathlib import Path

from camera.digests import digest_file, digest_json
from camera.errors import MISREAD, CameraError
from camera.files import read_json, write_json

_RECORD = "parts.json"


class Parts:
    """The record of a working folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digests: dict[str, str] = {}

    def are_whole(self) -> bool:
        """Read the record; whether there is one, and every file in it is there as it was written."""
        try:
            content = read_json(self._folder / _RECORD)
            digests = dict(content["files"])
            if content["checksum"] != digest_json(digests):
                return False
            self._digests = digests
            return all(digest_file(self._folder / name) == digest for name, digest in digests.items())
        except (CameraError, OSError, *MISREAD):
            return False

    def begin(self) -> None:
        """Record that there is none yet."""
        self._digests = {}
        self._write()

    def add(self, name: str) -> None:
        """Record a file that was written."""
        self._digests[name] = digest_file(self._folder / name)
        self._write()

    def _write(self) -> None:
        content = {"files": self._digests, "checksum": digest_json(self._digests)}
        write_json(self._folder / _RECORD, content)

    def forget(self) -> None:
        """Remove the record, once the folder is finished."""
        (self._folder / _RECORD).unlink(missing_ok=True)
