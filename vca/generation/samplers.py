"""Samplers: DDPM and DDIM for a diffusion, ODE and SDE solvers for an interpolant.

Every sampler takes a network and the initial noise, and returns the samples with the NFE (network evaluations). The
noise of each step comes from `noise(step)`; otherwise samplers are deterministic.

No step reads a value from the device, except with `dopri5`: the network receives each time as a Python number.

Shape letters: B batch. States are `(B, I, H, W)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vca.generation.diffusion import GaussianDiffusion, SamplingNet
from vca.generation.interpolant import DiffusionForm, Interpolant

Noise = Callable[[int], Tensor]
Field = Callable[[Tensor, float], Tensor]  # (x, t) -> dx / dt


@dataclass(frozen=True)
class SamplerOutput:
    """Samples, and the NFE (network evaluations) per sample."""

    x: Tensor
    nfe: int


class Counted:
    """Network wrapper that counts calls."""

    def __init__(self, net: SamplingNet) -> None:
        self.net, self.calls = net, 0

    def __call__(self, x: Tensor, t: float) -> Tensor:
        self.calls += 1
        return self.net(x, t).to(x.dtype)  # the state keeps its dtype when the network runs in bf16


def sample_ddpm(net: SamplingNet, x: Tensor, diffusion: GaussianDiffusion, steps: int, noise: Noise) -> SamplerOutput:
    """Sample with DDPM over `steps` of the chain's steps."""
    chain, counted = diffusion.respaced(steps), Counted(net)
    for step, index in enumerate(reversed(range(steps))):
        x = chain.ddpm_step(counted, x, index, noise(step))
    return SamplerOutput(x, counted.calls)


def sample_ddim(
    net: SamplingNet, x: Tensor, diffusion: GaussianDiffusion, steps: int, noise: Noise | None = None, eta: float = 0.0
) -> SamplerOutput:
    """Sample with DDIM over `steps` of the chain's steps; `eta=0` needs no noise."""
    if eta and noise is None:
        raise ValueError(f"noise must be given for eta > 0, got eta={eta}")
    chain, counted = diffusion.respaced(steps), Counted(net)
    for step, index in enumerate(reversed(range(steps))):
        x = chain.ddim_step(counted, x, index, noise(step) if noise and eta else torch.zeros_like(x), eta)
    return SamplerOutput(x, counted.calls)


def sample_ode(
    net: SamplingNet,
    x: Tensor,
    interpolant: Interpolant,
    method: str = "dopri5",
    points: int = 50,
    rtol: float = 1e-3,
    atol: float = 1e-6,
) -> SamplerOutput:
    """Solve `dx = v dt` from noise to data.

    Args:
        net, x, interpolant: network, initial noise, and the interpolant it was trained with.
        method: `euler` or `heun` on a grid of `points` times, or `dopri5` (adaptive, tolerances `rtol` and `atol`).
        points: grid points including both ends, as in SiT; `euler` takes `points - 1` steps.
    """
    counted = Counted(net)
    start, end = interpolant.sample_interval()

    def velocity(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), t, device=x.device)
        return interpolant.velocity(counted(x, t), x, times)

    if method == "dopri5":
        from torchdiffeq import odeint

        # The solver chooses its steps on the host, from the error of the last one: it reads several values a step
        # itself, so reading the time as well costs little.
        span = torch.tensor([start, end], device=x.device)
        x = odeint(lambda t, x: velocity(x, float(t)), x, span, method="dopri5", rtol=rtol, atol=atol)[-1]
        return SamplerOutput(x, counted.calls)
    if method not in (steps := {"euler": euler_step, "heun": heun_step}):
        raise ValueError(f"method must be euler, heun or dopri5, got '{method}'")
    for t, after in pairwise(time_grid(start, end, points)):
        x = steps[method](velocity, x, t, after - t)
    return SamplerOutput(x, counted.calls)


def euler_step(field: Field, x: Tensor, t: float, dt: float) -> Tensor:
    """Take an explicit Euler step (first order)."""
    return x + dt * field(x, t)


def heun_step(field: Field, x: Tensor, t: float, dt: float) -> Tensor:
    """Take a step of Heun's method (second order)."""
    first = field(x, t)
    return x + 0.5 * dt * (first + field(x + dt * first, t + dt))


def sample_sde(
    net: SamplingNet,
    x: Tensor,
    interpolant: Interpolant,
    noise: Noise,
    method: str = "euler",
    points: int = 250,
    form: DiffusionForm = DiffusionForm.sigma,
    norm: float = 1.0,
    last_step: str | None = "mean",
    last_step_size: float = 0.04,
) -> SamplerOutput:
    """Solve `dx = (v + w s) dt + sqrt(2 w) dW` from noise to data.

    Args:
        net, x, interpolant: network, initial noise, and the interpolant it was trained with.
        noise: noise of each of the `points - 1` steps.
        method: `euler` (Euler-Maruyama) or `heun` (noise first, then a Heun step of the drift).
        points: grid points including both ends, as in SiT.
        form, norm: form and scale of the diffusion coefficient w.
        last_step: noise-free final step of size `last_step_size`: `mean` (a step of the SDE's drift), `euler` (a step
            of the ODE), `tweedie` (the mean of the data given x), or None for no final step.
    """
    counted = Counted(net)
    rest = last_step_size if last_step is not None else 0.0
    start, end = interpolant.sample_interval(form, rest)

    def terms(x: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return velocity, score and w from one network evaluation."""
        times = torch.full((len(x),), t, device=x.device)
        out = counted(x, t)
        w = interpolant.diffusion(form, norm, x, times)
        return interpolant.velocity(out, x, times), interpolant.score(out, x, times), w

    def drift(x: Tensor, t: float) -> Tensor:
        velocity, score, w = terms(x, t)
        return velocity + w * score

    if method not in ("euler", "heun"):
        raise ValueError(f"method must be euler or heun, got '{method}'")
    for index, (t, after) in enumerate(pairwise(time_grid(start, end, points))):
        dt = after - t
        w = interpolant.diffusion(form, norm, x, torch.full((len(x),), t, device=x.device))
        kick = (2 * w * dt).sqrt() * noise(index)
        x = heun_step(drift, x + kick, t, dt) if method == "heun" else euler_step(drift, x, t, dt) + kick

    if last_step is None:
        return SamplerOutput(x, counted.calls)
    velocity, score, w = terms(x, end)
    if last_step == "mean":
        x = x + rest * (velocity + w * score)
    elif last_step == "euler":
        x = x + rest * velocity
    elif last_step == "tweedie":
        c = interpolant.at(torch.full((len(x),), end, device=x.device), x)
        x = x / c.alpha + c.sigma**2 / c.alpha * score
    else:
        raise ValueError(f"last_step must be mean, euler, tweedie or None, got '{last_step}'")
    return SamplerOutput(x, counted.calls)


def time_grid(start: float, end: float, points: int) -> list[float]:
    """Return `points` evenly spaced times from `start` to `end`."""
    if points < 2:
        raise ValueError(f"points must be >= 2, got {points}")
    return [start + (end - start) * index / (points - 1) for index in range(points)]
