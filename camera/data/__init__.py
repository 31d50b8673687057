"""Datasets: where text comes from, and how it becomes the tokens that are calibrated and measured on."""

from camera.data.documents import Documents
from camera.data.load import (
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
