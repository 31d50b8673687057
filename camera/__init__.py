"""Compress large language models: importance, pruning, 4-bit formats, measurement.

This package is the mathematics, the formats and the devices. It knows no orchestrator: it never imports
prefect, mlflow or dvc, nor the packages ``tasks`` and ``flows`` that are built on it.
"""

__version__ = "0.1.0"
