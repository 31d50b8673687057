"""The Hugging Face hub's client, with an end to its patience."""

from typing import Any


def bound_waiting() -> None:
    """Let every call to the hub fail that hears nothing for HF_HUB_DOWNLOAD_TIMEOUT seconds (10 by default).

    Most calls of the client ask to wait for ever: a hub, or a proxy before it, that takes connections and never answers
    would hold a nightly run until somebody looks.
    """
    from huggingface_hub import get_session  # heavy, and most models are folders

    client = get_session()
    hooks = client.event_hooks
    if _bound not in hooks["request"]:
        client.event_hooks = {**hooks, "request": [*hooks["request"], _bound]}


def _bound(request: Any) -> None:
    """Give a request that would wait for ever the time-out of downloads."""
    from huggingface_hub import constants

    asked: dict[str, float | None] = request.extensions.get("timeout", {})
    most = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    request.extensions["timeout"] = {
        phase: most if asked.get(phase) is None else asked[phase]
        for phase in ("connect", "read", "write", "pool")
    }
