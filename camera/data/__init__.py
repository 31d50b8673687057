"""Data sets: where text comes from, and how it becomes the tokens that are calibrated and measured on."""

from camera.data.sets import Documents
from camera.data.tokens import (
    calibration_tokens,
    calibration_windows,
    evaluation_tokens,
    read_documents,
    sampled_windows,
)

__all__ = [
    "Documents",
    "calibration_tokens",
    "calibration_windows",
    "evaluation_tokens",
    "read_documents",
    "sampled_windows",
]
