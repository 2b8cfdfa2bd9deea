"""From noise to samples: ancestral and implicit steps of a diffusion, ODE and SDE solvers of an interpolant.

Every sampler takes a network, the starting noise, and counts how often it called the network: `Samples.evaluations` is
the figure that a protocol states. Noise inside a chain comes from `noise(step)`, so that whoever calls decides what it
depends on; every sampler is deterministic otherwise.

Shape letters: B batch. States are `(B, I, H, W)`, times `(B,)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vca.generation.diffusion import GaussianDiffusion, Net
from vca.generation.interpolant import DiffusionForm, Interpolant

Noise = Callable[[int], Tensor]
Field = Callable[[Tensor, float], Tensor]  # (x, t) -> dx / dt


@dataclass(frozen=True)
class SamplerOutput:
    """What came out, and how many times the network was evaluated for it."""

    x: Tensor
    nfe: int


class Counted:
    """A network that counts its calls."""

    def __init__(self, net: Net) -> None:
        self.net, self.calls = net, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Evaluate, and count; the chain goes on in the precision of x, also where the network is in bf16."""
        self.calls += 1
        return self.net(x, t).to(x.dtype)


def sample_ddpm(net: Net, x: Tensor, diffusion: GaussianDiffusion, steps: int, noise: Noise) -> SamplerOutput:
    """Ancestral sampling over `steps` of the chain's steps."""
    chain, counted = diffusion.respaced(steps), Counted(net)
    for step, index in enumerate(reversed(range(steps))):
        x = chain.ddpm_step(counted, x, index, noise(step))
    return SamplerOutput(x, counted.calls)


def sample_ddim(
    net: Net, x: Tensor, diffusion: GaussianDiffusion, steps: int, noise: Noise | None = None, eta: float = 0.0
) -> SamplerOutput:
    """DDIM over `steps` of the chain's steps; `eta=0` needs no noise."""
    if eta and noise is None:
        raise ValueError(f"DDIM with eta={eta} needs noise")
    chain, counted = diffusion.respaced(steps), Counted(net)
    for step, index in enumerate(reversed(range(steps))):
        x = chain.ddim_step(counted, x, index, noise(step) if noise and eta else torch.zeros_like(x), eta)
    return SamplerOutput(x, counted.calls)


def sample_ode(
    net: Net,
    x: Tensor,
    interpolant: Interpolant,
    method: str = "dopri5",
    points: int = 50,
    rtol: float = 1e-3,
    atol: float = 1e-6,
) -> SamplerOutput:
    """Solve `dx = v dt` from noise to data.

    Args:
        net, x, interpolant: the network, the noise, and what its output means.
        method: `euler` or `heun` on a grid of `points` times, or `dopri5`, which chooses its own within `rtol, atol`.
        points: of the grid, both ends counted, as SiT counts; `euler` makes `points - 1` steps.
    """
    counted = Counted(net)
    start, end = interpolant.sample_interval()

    def velocity(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), float(t), device=x.device)
        return interpolant.velocity(counted(x, times), x, times)

    if method == "dopri5":
        from torchdiffeq import odeint

        span = torch.tensor([start, end], device=x.device)
        x = odeint(lambda t, x: velocity(x, float(t)), x, span, method="dopri5", rtol=rtol, atol=atol)[-1]
        return SamplerOutput(x, counted.calls)
    if method not in ("euler", "heun"):
        raise ValueError(f"the ODE method must be euler, heun or dopri5, got '{method}'")
    times = time_grid(start, end, points)
    step = {"euler": euler_step, "heun": heun_step}[method]
    for t, after in pairwise(times):
        x = step(velocity, x, t, after - t)
    return SamplerOutput(x, counted.calls)


def euler_step(field: Field, x: Tensor, t: float, dt: float) -> Tensor:
    """Explicit Euler, first order."""
    return x + dt * field(x, t)


def heun_step(field: Field, x: Tensor, t: float, dt: float) -> Tensor:
    """Heun's method, second order."""
    first = field(x, t)
    return x + 0.5 * dt * (first + field(x + dt * first, t + dt))


def sample_sde(
    net: Net,
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
        net, x, interpolant: the network, the noise, and what its output means.
        noise: of each step, `points - 1` of them.
        method: `euler` (Euler-Maruyama) or `heun` (noise first, then Heun's step of the drift).
        points: of the time grid, both ends counted, as SiT counts.
        form, norm: of the diffusion coefficient w.
        last_step: how the rest, `last_step_size` of time, is gone without noise: `mean` (a step of the SDE's drift),
            `euler` (a step of the ODE), `tweedie` (the mean of the data given x), or None: there is no rest.
    """
    counted = Counted(net)
    rest = last_step_size if last_step is not None else 0.0
    start, end = interpolant.sample_interval(form, rest)

    def read(x: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """Velocity, score and w from one evaluation."""
        times = torch.full((len(x),), float(t), device=x.device)
        out = counted(x, times)
        w = interpolant.diffusion(form, norm, x, times)
        return interpolant.velocity(out, x, times), interpolant.score(out, x, times), w

    def drift(x: Tensor, t: float) -> Tensor:
        velocity, score, w = read(x, t)
        return velocity + w * score

    if method not in ("euler", "heun"):
        raise ValueError(f"the SDE method must be euler or heun, got '{method}'")
    times = time_grid(start, end, points)
    for index, (t, after) in enumerate(pairwise(times)):
        dt = after - t
        w = interpolant.diffusion(form, norm, x, torch.full((len(x),), t, device=x.device))
        kick = (2 * w * dt).sqrt() * noise(index)
        x = heun_step(drift, x + kick, t, dt) if method == "heun" else euler_step(drift, x, t, dt) + kick

    if last_step is None:
        return SamplerOutput(x, counted.calls)
    velocity, score, w = read(x, end)
    if last_step == "mean":
        x = x + rest * (velocity + w * score)
    elif last_step == "euler":
        x = x + rest * velocity
    elif last_step == "tweedie":
        c = interpolant.at(torch.full((len(x),), end, device=x.device), x)
        x = x / c.alpha + c.sigma**2 / c.alpha * score
    else:
        raise ValueError(f"the last step must be mean, euler, tweedie or None, got '{last_step}'")
    return SamplerOutput(x, counted.calls)


def time_grid(start: float, end: float, points: int) -> list[float]:
    """`points` evenly spaced times from `start` to `end`."""
    if points < 2:
        raise ValueError(f"the number of points must be >= 2, got {points}")
    return [start + (end - start) * index / (points - 1) for index in range(points)]
