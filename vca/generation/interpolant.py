"""Interpolants between noise and data, as in SiT (arXiv 2401.08740; stochastic interpolants, 2303.08797).

Time runs from noise at 0 to data at 1:

    x_t = alpha(t) x_1 + sigma(t) x_0,    x_0 noise, x_1 data
    velocity  v = d alpha x_1 + d sigma x_0          of the ODE dx = v dt
    score     s = -x_0 / sigma                       of the density of x_t

    path      alpha(t)           sigma(t)
    linear    t                  1 - t
    gvp       sin(pi t / 2)      cos(pi t / 2)
    vp        exp(l)             sqrt(1 - exp(2 l)),   l = -(1 - t)^2 (b1 - b0) / 4 - (1 - t) b0 / 2

A network may predict any of the three (noise, velocity, score); each follows from any other and x_t.

Shape letters: B batch. `net(x, t)` maps `(B, I, H, W)` and times `(B,)` to `(B, I, H, W)`.
"""

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from vca.generation.diffusion import Net

VP_BETAS = (0.1, 20.0)  # b0, b1: noise rates at the data end and at the noise end


class PathType(Enum):
    """Path between noise and data."""

    linear = "linear"
    gvp = "gvp"
    vp = "vp"


class Prediction(Enum):
    """Quantity that the network predicts."""

    velocity = "velocity"
    noise = "noise"
    score = "score"


class Weighting(Enum):
    """Weighting over time of the loss of a noise or score prediction."""

    none = "none"
    velocity = "velocity"
    likelihood = "likelihood"


class DiffusionForm(Enum):
    """Diffusion coefficient of the SDE over time; the marginals do not depend on it."""

    sbdm = "sbdm"
    sigma = "sigma"
    constant = "constant"
    linear = "linear"
    decreasing = "decreasing"
    increasing_decreasing = "increasing_decreasing"


@dataclass(frozen=True)
class Coefficients:
    """alpha, sigma, their derivatives, and `ratio = d_alpha / alpha`, which stays exact where alpha is tiny."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor
    ratio: Tensor

    @property
    def drift_variance(self) -> Tensor:
        """Return g of `velocity = ratio x + g score`."""
        return self.ratio * self.sigma**2 - self.sigma * self.d_sigma


def coefficients(path: PathType, t: Tensor) -> Coefficients:
    """Return the coefficients of a path at times `t`, elementwise."""
    if path is PathType.linear:
        return Coefficients(t, 1 - t, torch.ones_like(t), -torch.ones_like(t), 1 / t)
    if path is PathType.gvp:
        angle, rate = t * math.pi / 2, math.pi / 2
        alpha, sigma = angle.sin(), angle.cos()
        return Coefficients(alpha, sigma, rate * sigma, -rate * alpha, rate / angle.tan())
    low, high = VP_BETAS
    log_alpha = -0.25 * (1 - t) ** 2 * (high - low) - 0.5 * (1 - t) * low
    ratio = 0.5 * ((1 - t) * (high - low) + low)
    alpha, sigma = log_alpha.exp(), (1 - (2 * log_alpha).exp()).sqrt()
    return Coefficients(alpha, sigma, alpha * ratio, -(alpha**2) * ratio / sigma, ratio)


@dataclass(frozen=True)
class Interpolant:
    """Path, prediction and loss weighting: the equations between a network and its loss or samples.

    Attributes:
        train_eps, sample_eps: distance from the ends of time at which the equations are singular; None uses SiT's.
    """

    path: PathType = PathType.linear
    prediction: Prediction = Prediction.velocity
    weighting: Weighting = Weighting.none
    train_eps: float | None = None
    sample_eps: float | None = None

    def at(self, t: Tensor, x: Tensor) -> Coefficients:
        """Return the coefficients at times `t` `(B,)`, shaped to multiply `x`."""
        return coefficients(self.path, t.reshape(-1, *[1] * (x.ndim - 1)))

    def mix(self, noise: Tensor, data: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x_t` and its velocity."""
        c = self.at(t, data)
        return c.alpha * data + c.sigma * noise, c.d_alpha * data + c.d_sigma * noise

    def losses(self, net: Net, noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """Return the loss of each image, `(B,)`."""
        xt, velocity = self.mix(noise, data, t)
        out = net(xt, t).float()
        if self.prediction is Prediction.velocity:
            return (out - velocity).square().flatten(1).mean(1)
        c = self.at(t, data)
        weight = {
            Weighting.none: torch.ones_like(c.sigma),
            Weighting.velocity: (c.drift_variance / c.sigma) ** 2,
            Weighting.likelihood: c.drift_variance / c.sigma**2,
        }[self.weighting]
        error = out - noise if self.prediction is Prediction.noise else out * c.sigma + noise
        return (weight * error.square()).flatten(1).mean(1)

    def velocity(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Convert the network's output to a velocity."""
        if self.prediction is Prediction.velocity:
            return out
        c = self.at(t, x)
        return c.ratio * x + c.drift_variance * self.score(out, x, t)

    def score(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Convert the network's output to a score."""
        if self.prediction is Prediction.score:
            return out
        c = self.at(t, x)
        if self.prediction is Prediction.noise:
            return -out / c.sigma
        inverse = c.alpha / c.d_alpha  # finite at t = 0, unlike the ratio
        return (inverse * out - x) / (c.sigma**2 - inverse * c.d_sigma * c.sigma)

    def diffusion(self, form: DiffusionForm, norm: float, x: Tensor, t: Tensor) -> Tensor:
        """Return the coefficient w of the SDE `dx = (v + w s) dt + sqrt(2 w) dW`, `(B, 1, 1, 1)`."""
        c = self.at(t, x)
        time = t.reshape(c.sigma.shape)
        return {
            DiffusionForm.sbdm: norm * c.drift_variance,
            DiffusionForm.sigma: norm * c.sigma,
            DiffusionForm.constant: torch.full_like(time, norm),
            DiffusionForm.linear: norm * (1 - time),
            DiffusionForm.decreasing: 0.25 * (norm * torch.cos(math.pi * time) + 1) ** 2,
            DiffusionForm.increasing_decreasing: norm * torch.sin(math.pi * time) ** 2,
        }[form]

    def train_interval(self) -> tuple[float, float]:
        """Return the first and last time of training."""
        default = 1e-5 if self.path is PathType.vp else 0.0 if self.prediction is Prediction.velocity else 1e-3
        return self.interval(default if self.train_eps is None else self.train_eps)

    def sample_interval(self, form: DiffusionForm | None = None, last_step: float = 0.0) -> tuple[float, float]:
        """Return the first and last time of sampling: of the ODE, or of an SDE before its last step."""
        regular = self.path is not PathType.vp and self.prediction is Prediction.velocity
        default = 0.0 if regular and form is not DiffusionForm.sbdm else 1e-3
        return self.interval(default if self.sample_eps is None else self.sample_eps, form, last_step)

    def interval(self, eps: float, form: DiffusionForm | None = None, last_step: float = 0.0) -> tuple[float, float]:
        """Return where time starts and ends: `eps` away from singular ends."""
        velocity = self.prediction is Prediction.velocity
        end = 1 - last_step if form is not None and last_step else 1 - eps
        if self.path is PathType.vp:
            return 0.0, end
        if velocity and form is None:
            return 0.0, 1.0
        return (0.0 if velocity and form is not DiffusionForm.sbdm else eps), end
