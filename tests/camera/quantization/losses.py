"""Second moments to quantise for, and what is lost by them, computed plainly."""

import torch


def correlated(width: int, tokens: int = 2000, seed: int = 0) -> torch.Tensor:
    """Second moments of inputs that have a lot to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator).mul(0.5) + torch.randn(
        width, 1, generator=generator
    )
    inputs = torch.randn(tokens, width, generator=generator) @ mixing
    return (inputs.T @ inputs).double()


def output_error(weight: torch.Tensor, stored: torch.Tensor, moments: torch.Tensor) -> float:
    """√(tr Δ·H·Δᵀ / tr W·H·Wᵀ) with Δ = stored − W."""
    delta, weight, moments = (stored - weight).double(), weight.double(), moments.double()
    return float((((delta @ moments) * delta).sum() / ((weight @ moments) * weight).sum()).sqrt())


def error_by_squares(weight: torch.Tensor, stored: torch.Tensor, importance: torch.Tensor) -> float:
    """The same for inputs that are not correlated, of such second moments."""
    return output_error(weight, stored, importance.double().diag())
