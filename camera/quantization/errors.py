"""How much of a layer's output is lost when its weights are stored: relative, on the calibration tokens."""

import torch


def error_by_squares(weight: torch.Tensor, stored: torch.Tensor, importance: torch.Tensor) -> float:
    """√(Σ m_j·(stored − w)² / Σ m_j·w²): of the output's RMS, if the inputs were not correlated.

    Args:
        weight, stored: float32 [rows, I].
        importance: [I], second moments m of the inputs.
    """
    importance = importance.double()
    noise = (stored - weight).double().square().sum(0) @ importance
    power = weight.double().square().sum(0) @ importance
    return _ratio(noise, power)


def error_by_products(weight: torch.Tensor, stored: torch.Tensor, moments: torch.Tensor) -> float:
    """√(tr Δ·H·Δᵀ / tr W·H·Wᵀ) with Δ = stored − W: of the output's RMS, exactly.

    Args:
        weight, stored: float32 [rows, I].
        moments: [I, I], H = Σ x·xᵀ of the inputs.
    """
    moments = moments.float()
    delta = stored - weight
    return _ratio(((delta @ moments) * delta).sum().double(), ((weight @ moments) * weight).sum().double())


def _ratio(noise: torch.Tensor, power: torch.Tensor) -> float:
    return float((noise.clamp_min(0) / power).sqrt()) if power > 0 else 0.0
