"""A mixture of Gaussians on the line: a data law whose every diffused density, score and quantile is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Σ_k w_k N(m_k, s_k²).  Points are float64 of any shape, and so are the results."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def diffused(self, alpha: float, sigma: float) -> Mixture:
        """The law of α z_0 + σ ε: Gaussian noise keeps a mixture a mixture."""
        stds = tuple((alpha**2 * s**2 + sigma**2) ** 0.5 for s in self.stds)
        return Mixture(self.weights, tuple(alpha * m for m in self.means), stds)

    def density(self, z: Tensor) -> Tensor:
        return torch.stack(self._parts(z)).sum(0)

    def score(self, z: Tensor) -> Tensor:
        """d ln p / dz."""
        parts = self._parts(z)
        pulls = [part * ((m - z) / s**2) for part, m, s in zip(parts, self.means, self.stds, strict=True)]
        return sum(pulls[1:], pulls[0]) / sum(parts[1:], parts[0])

    def cdf(self, z: Tensor) -> Tensor:
        rows = zip(self.weights, self.means, self.stds, strict=True)
        return torch.stack([w * torch.special.ndtr((z - m) / s) for w, m, s in rows]).sum(0)

    def quantile(self, u: Tensor) -> Tensor:
        """The inverse of the cdf, by bisection to the last bit or two."""
        reach = max(abs(m) + 40 * s for m, s in zip(self.means, self.stds, strict=True))
        low, high = torch.full_like(u, -reach), torch.full_like(u, reach)
        for _ in range(70):
            middle = (low + high) / 2
            below = self.cdf(middle) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def draw(self, num_draws: int, generator: torch.Generator) -> Tensor:
        """[num_draws], float64."""
        which = torch.multinomial(torch.tensor(self.weights), num_draws, replacement=True, generator=generator)
        noise = torch.randn(num_draws, generator=generator, dtype=torch.float64)
        means, stds = (torch.tensor(values, dtype=torch.float64)[which] for values in (self.means, self.stds))
        return means + stds * noise

    def _parts(self, z: Tensor) -> list[Tensor]:
        rows = zip(self.weights, self.means, self.stds, strict=True)
        return [(w / (s * (2 * torch.pi) ** 0.5)) * torch.exp(-0.5 * ((z - m) / s).square()) for w, m, s in rows]
