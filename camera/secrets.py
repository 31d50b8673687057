"""Passwords and tokens, kept out of everything that others read: messages, logs, parameters, lineage."""

import os
import re

_IN_URL = re.compile(r"(?<=://)[^/@\s'\"]+@")
_PARAMETER = re.compile(r"(?i)([?&](?:[\w-]*(?:token|key|secret|password|signature|sig))=)[^&\s'\"]+")
_NAMED = re.compile(r"(?:TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY|CREDENTIALS|CONNECTION_STRING)(?:_ID)?$")
_SHORTEST = 6
"""A shorter value is found in innocent words."""
HIDDEN = "***"


def without_secrets(text: str) -> str:
    """A text without the user part of URLs, secret parameters of URLs, and secrets that the environment holds."""
    text = _IN_URL.sub(f"{HIDDEN}@", text)
    text = _PARAMETER.sub(rf"\g<1>{HIDDEN}", text)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _NAMED.search(name.upper()):
            text = text.replace(value, HIDDEN)
    return text
