"""Private things out of what is sent: folders, user, host, tokens."""

import getpass
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from camera.options import CheckOptions
from camera.secrets import HIDDEN, without_secrets

_TOKEN = re.compile(r"\b(?:hf|ghp|gho|ghs|sk|glpat)[-_][A-Za-z0-9_-]{16,}")
_ADDRESS = re.compile(r"(?<=//)\d{1,3}(?:\.\d{1,3}){3}\b|\b\d{1,3}(?:\.\d{1,3}){3}(?=:\d{2,5}\b)")
_HOME = re.compile(r"/(?:home|Users|data/home)/[^/\s'\":,]+")
_ORDINARY = frozenset(
    {"root", "user", "users", "admin", "ubuntu", "camera", "torch", "ascend", "localhost", "test"}
)
"""Names of users and hosts that say nothing of anybody, and are words of the report."""
_SHORTEST = 3


class Redactor:
    """Replaces what names a person or a machine."""

    def __init__(self, options: CheckOptions, out: Path) -> None:
        """Args:
        options: whose folders get names: MODEL, LLAMA_CPP, LLAMA_CPP_STOCK.
        out: the folder of the check: OUT.
        """
        places = {
            "OUT": out,
            "MODEL": options.model,
            "LLAMA_CPP": options.llama_cpp,
            "LLAMA_CPP_STOCK": options.llama_cpp_stock,
            "CAMERA": Path(__file__).parents[2],
            "PYTHON": Path(sys.prefix),
            "HERE": Path.cwd(),
            "TMP": Path(tempfile.gettempdir()),
            "~": Path.home(),
        }
        self._folders = sorted(_spellings(places), key=lambda each: -len(each[0]))
        hosts = {platform.node(), platform.node().partition(".")[0]}
        words = [(_user(), "USER"), *((host, "HOST") for host in sorted(hosts, key=len, reverse=True))]
        self._words = [
            (re.compile(rf"(?<![\w]){re.escape(word)}(?![\w])"), name)
            for word, name in words
            if len(word) >= _SHORTEST and word.lower() not in _ORDINARY
        ]

    def __call__(self, text: str) -> str:
        text = without_secrets(text)
        for folder, name in self._folders:
            text = text.replace(folder, name)
        text = _HOME.sub("~", text)
        for pattern, name in self._words:
            text = pattern.sub(name, text)
        return _ADDRESS.sub(HIDDEN, _TOKEN.sub(HIDDEN, text))


def _spellings(places: dict[str, Path | None]) -> Iterable[tuple[str, str]]:
    """Each folder as it was given and as it is, but for those that everybody has."""
    for name, path in places.items():
        for each in () if path is None else {str(path.absolute()), str(path.resolve())}:
            if each != os.sep and not each.startswith("/usr"):
                yield each, name


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user that no file knows
        return ""
