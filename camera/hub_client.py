"""Time-outs for the Hugging Face hub's client."""

from typing import Any


def set_timeouts() -> None:
    """Let every call to the hub fail that hears nothing for HF_HUB_DOWNLOAD_TIMEOUT seconds (10 by default).

    Most calls of the client have no time-out: a hub, or a proxy before it, that accepts connections and never answers
    would hold a nightly run until somebody looks.
    """
    from huggingface_hub import get_session  # heavy, and most models are folders

    client = get_session()
    hooks = client.event_hooks
    if _set_timeout not in hooks["request"]:
        client.event_hooks = {**hooks, "request": [*hooks["request"], _set_timeout]}


def _set_timeout(request: Any) -> None:
    """Give a request without a time-out that of downloads."""
    from huggingface_hub import constants

    asked: dict[str, float | None] = request.extensions.get("timeout", {})
    most = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    phases = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {
        phase: most if asked.get(phase) is None else asked[phase] for phase in phases
    }
