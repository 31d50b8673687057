"""Passwords and tokens, kept out of everything that others read: messages, logs, parameters, lineage."""

import os
import re
from collections.abc import Iterator
from urllib.parse import quote, unquote

_WORD = re.compile(r"[^\s'\"]+")
_IN_URL = re.compile(
    r"(?<=://)(?!(?:(?<=http://)|(?<=https://))[^\s/@:]*:\d{1,5}/)(?:[^\s/@:'\"]*:[^\s'\"]*|[^\s/@'\"]+)@"
)
"""A user's part of a URL: up to the last `@` where it has a password, which may hold `/` and `@` as they are.
Of http a number before a `/` is a port, as it is to every library."""
_PARAMETER = re.compile(
    r"(?i)([?&;](?:[\w-]*(?:token|key|secret|password|passwd|pwd|signature|sig))=)[^&\s'\"]+"
)
_NAMED = re.compile(
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|AUTH_STRING|APIKEY|(?<!PUBLIC)_KEY|CREDENTIAL|CONNECTION_STRING)"
    r"S?(?:_ID)?$"
)
_ADDRESS = re.compile(r"\s*[A-Za-z][\w+.-]*://(.+)@", re.DOTALL)
_SHORTEST = 6
"""A shorter value is found in innocent words."""
HIDDEN = "***"


def without_secrets(text: str) -> str:
    """A text without the user part of URLs, secret parameters of URLs, and secrets that the environment holds.

    Of addresses in the environment the password goes also where it stands alone, encoded or not, and in the pieces that a
    library makes of one with `/` or `@` in it.
    """
    text = _WORD.sub(_without_user, text)
    text = _PARAMETER.sub(rf"\g<1>{HIDDEN}", text)
    for secret in sorted(set(_in_environment()), key=len, reverse=True):
        if secret.lower() in text.lower():
            text = re.sub(re.escape(secret), HIDDEN, text, flags=re.IGNORECASE)
    return text


def _without_user(found: re.Match[str]) -> str:
    """A word without users of URLs. All behind the last `@` is left aside, or every `://` would be searched to the end."""
    before, at, after = found[0].rpartition("@")
    return _IN_URL.sub(f"{HIDDEN}@", before + at) + after


def _in_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _NAMED.search(name.upper()):
            yield value
        if "://" in value and (address := _ADDRESS.match(value)) is not None:
            yield from _of_user(address[1])


def _of_user(part: str) -> Iterator[str]:
    """What must not be seen of `user:password`, or of a token alone."""
    user, colon, password = part.partition(":")
    secret = password if colon else user
    for form in (secret, unquote(secret), quote(secret, safe="")):
        pieces = [form, *re.split(r"[/@:?#,]", form)]
        yield from (piece for piece in pieces if piece != user or not colon if _is_telling(piece))


def _is_telling(piece: str) -> bool:
    """Whether a piece is hardly found in innocent words."""
    if len(piece) >= _SHORTEST:
        return True
    mixed = piece.isalpha() and not (piece.islower() or piece.isupper() or piece.istitle())
    return len(piece) >= 3 and (mixed or not (piece.isalpha() or piece.isdigit()))
