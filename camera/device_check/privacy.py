"""Private things out of what is sent: folders, user, host, tokens."""

import getpass
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from camera.options import CheckOptions
from camera.results import Result
from camera.secrets import HIDDEN, without_secrets

_Found = TypeVar("_Found", bound=Result)
_TOKEN = re.compile(r"\b(?:hf|ghp|gho|ghs|sk|glpat)[-_][A-Za-z0-9_-]{16,}")
_QUAD = r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\d)"
_ADDRESS = re.compile(
    rf"(?<=//){_QUAD}|{_QUAD}(?=:\d{{2,5}}\b)"
    r"|(?<![\d.])(?:10\.\d{1,3}|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d{1,3}\.\d{1,3}(?!\.?\d)"
)
"""After `//`, before a port, or of a private network: any other four numbers may be a version."""
_NAMES_ADDRESS = re.compile(r"\w+_(?:IP|ADDR|ADDRESS|HOST)")
_SET_ADDRESS = re.compile(rf"\b({_NAMES_ADDRESS.pattern}=)[^\s'\"]+")
_HOME = re.compile(r"/(?:home|Users|data/home)/[^/\s'\":,]+")
_ORDINARY = (
    frozenset({"root", "user", "users", "admin", "ubuntu", "localhost", "test"})
    | {"camera", "torch", "ascend", "host", "device", "model", "npu", "cuda", "cpu"}
    | {"full", "quick", "tiny", "passed", "failed", "skipped"}
)
"""Names of users and hosts that say nothing of anybody, and are words of the report."""
_SHORTEST, _LONG = 3, 5
"""Letters of a name that is looked for, and of one that is found within words: shorter ones are part of innocent words."""


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
            (_pattern(word), name)
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
        text = _SET_ADDRESS.sub(rf"\g<1>{HIDDEN}", text)
        return _ADDRESS.sub(HIDDEN, _TOKEN.sub(HIDDEN, text))

    def result(self, found: _Found) -> _Found:
        """A result whose strings are clean; the names of fields and of what a mapping holds stay."""
        return type(found).model_validate(self._clean(found.model_dump(mode="json"), ""))

    def _clean(self, value: Any, name: str) -> Any:
        """Plain JSON; `name` is what the mapping around it calls it."""
        if isinstance(value, str):
            return HIDDEN if _NAMES_ADDRESS.fullmatch(name) else self(value)
        if isinstance(value, dict):
            return {key: self._clean(each, key) for key, each in value.items()}
        return [self._clean(each, name) for each in value] if isinstance(value, list) else value


def _spellings(places: dict[str, Path | None]) -> Iterable[tuple[str, str]]:
    """Each folder as it was given and as it is, but for those that everybody has."""
    for name, path in places.items():
        for each in () if path is None else {str(path.absolute()), str(path.resolve())}:
            if each != os.sep and not each.startswith("/usr"):
                yield each, name


def _pattern(name: str) -> re.Pattern[str]:
    """Where a name stands, in any case: `LIHUA`, `lihua_env`; a short one between what are no letters."""
    text = re.escape(name)
    return re.compile(text if len(name) >= _LONG else rf"(?<![^\W\d_]){text}(?![^\W\d_])", re.IGNORECASE)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user that no file knows
        return ""
