"""Training objectives and their samplers behind one interface: DiT's diffusion, SiT's interpolant.

`losses` computes the loss from data, noise and a uniform number that selects the time; `sample` maps noise to samples.
To add an objective: a config dataclass with a `name`, a class, and one line in `OBJECTIVES`.

Shape letters: B batch, I channels of the data. `net(x, t)` returns `(B, 2I, H, W)`, or `(B, I, H, W)` for an
interpolant without `learn_sigma`; t is `(B,)` in training, and a Python number in sampling.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vca.generation.diffusion import CPU, GaussianDiffusion, Net, SamplingNet, linear_betas
from vca.generation.interpolant import DiffusionForm, Interpolant, PathType, Prediction, Weighting
from vca.generation.samplers import Noise, SamplerOutput, sample_ddim, sample_ddpm, sample_ode, sample_sde
from vca.runtime.errors import check


class Method(Enum):
    """Sampling methods: the first two for diffusion, the others for an interpolant."""

    ddpm = "ddpm"
    ddim = "ddim"
    ode_euler = "ode_euler"
    ode_heun = "ode_heun"
    ode_dopri5 = "ode_dopri5"
    sde_euler = "sde_euler"
    sde_heun = "sde_heun"


@dataclass
class SamplerConfig:
    """Sampler settings.

    Attributes:
        method: sampling method; must belong to the objective.
        steps: sampling steps of a diffusion; points of the time grid of an interpolant; null for `ode_dopri5`.
        cfg_scale: classifier-free guidance scale; 1 disables guidance.
        cfg_channels: number of channels under guidance, null for all; DiT's and SiT's tables use 3.
        cfg_interval: `[low, high]` range of the noise time with guidance; 0 is data, 1 is noise.
        eta: noise scale of DDIM.
        rtol, atol: tolerances of `ode_dopri5`.
        diffusion_form, diffusion_norm, last_step, last_step_size: SDE settings, see
            `vca.generation.samplers.sample_sde`.
    """

    method: Method = Method.ddpm
    steps: int | None = 250
    cfg_scale: float = 1.0
    cfg_channels: int | None = 3
    cfg_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    eta: float = 0.0
    rtol: float = 1e-3
    atol: float = 1e-6
    diffusion_form: DiffusionForm = DiffusionForm.sigma
    diffusion_norm: float = 1.0
    last_step: str | None = "mean"
    last_step_size: float = 0.04

    def __post_init__(self) -> None:
        if self.method is Method.ode_dopri5:
            check(self.steps is None, "sampler.steps", "null for ode_dopri5 (adaptive step size)", self.steps)
        else:
            least = 1 if self.method in (Method.ddpm, Method.ddim) else 2
            check(self.steps is not None and self.steps >= least, "sampler.steps", f">= {least}", self.steps)
        check(self.cfg_scale >= 0, "sampler.cfg_scale", ">= 0", self.cfg_scale)
        channels = self.cfg_channels
        check(channels is None or channels >= 1, "sampler.cfg_channels", ">= 1 or null", channels)
        low_high = list(self.cfg_interval)
        ordered = len(low_high) == 2 and 0 <= low_high[0] <= low_high[1] <= 1
        check(ordered, "sampler.cfg_interval", "two numbers, 0 <= low <= high <= 1", low_high)
        for key in ("eta", "diffusion_norm"):
            check(getattr(self, key) >= 0, f"sampler.{key}", ">= 0", getattr(self, key))
        for key in ("rtol", "atol"):
            check(getattr(self, key) > 0, f"sampler.{key}", "> 0", getattr(self, key))
        known = ("mean", "euler", "tweedie", None)
        check(self.last_step in known, "sampler.last_step", "mean, euler, tweedie or null", self.last_step)
        check(0 < self.last_step_size < 1, "sampler.last_step_size", "in (0, 1)", self.last_step_size)


class Objective(Protocol):
    """Interface of an objective.

    Attributes:
        methods: its sampling methods.
        max_steps: the largest number of sampling steps; None if there is no limit.
    """

    methods: tuple[Method, ...]
    max_steps: int | None

    def losses(self, net: Net, data: Tensor, noise: Tensor, u: Tensor) -> dict[str, Tensor]:
        """Return `loss` of each image `(B,)` and its terms; `u` `(B,)` in [0, 1) selects the time."""

    def noise_time(self, t: float) -> float:
        """Convert a time of the network to a number from 0 (data) to 1 (noise)."""

    def sample(self, net: SamplingNet, noise: Tensor, sampler: SamplerConfig, step_noise: Noise) -> SamplerOutput:
        """Sample from noise; `step_noise(step)` is the noise of a step."""


@dataclass
class DiffusionConfig:
    """DiT's objective.

    Attributes:
        name: `diffusion`, the key in `OBJECTIVES`.
        steps: length of the diffusion chain.
    """

    name: str = "diffusion"
    steps: int = 1000

    def __post_init__(self) -> None:
        check(self.steps >= 2, "objective.steps", ">= 2", self.steps)


class Diffusion:
    """Noise prediction with learned range variance over a chain of linear betas."""

    methods = (Method.ddpm, Method.ddim)

    def __init__(self, config: DiffusionConfig, device: torch.device = CPU) -> None:
        self.chain = GaussianDiffusion(linear_betas(config.steps), device=device)
        self.max_steps: int | None = config.steps

    def losses(self, net: Net, data: Tensor, noise: Tensor, u: Tensor) -> dict[str, Tensor]:
        t = (u.double() * len(self.chain)).long()  # in float32, u * 1000 may round up to 1000
        return self.chain.losses(net, data, t, noise)

    def noise_time(self, t: float) -> float:
        return t / len(self.chain)

    def sample(self, net: SamplingNet, noise: Tensor, sampler: SamplerConfig, step_noise: Noise) -> SamplerOutput:
        assert sampler.steps is not None
        if sampler.method is Method.ddim:
            return sample_ddim(net, noise, self.chain, sampler.steps, step_noise, sampler.eta)
        return sample_ddpm(net, noise, self.chain, sampler.steps, step_noise)


@dataclass
class InterpolantConfig:
    """SiT's objective; the defaults are those of SiT's tables.

    Attributes:
        name: `interpolant`, the key in `OBJECTIVES`.
        path: `linear`, `gvp` or `vp`.
        prediction: `velocity`, `noise` or `score`.
        weighting: `none`, `velocity` or `likelihood`.
        train_eps, sample_eps: distance from singular ends of time; null uses SiT's.
    """

    name: str = "interpolant"
    path: PathType = PathType.linear
    prediction: Prediction = Prediction.velocity
    weighting: Weighting = Weighting.none
    train_eps: float | None = None
    sample_eps: float | None = None

    def __post_init__(self) -> None:
        for key in ("train_eps", "sample_eps"):
            value = getattr(self, key)
            check(value is None or 0 <= value < 0.5, f"objective.{key}", "in [0, 0.5) or null", value)


class StochasticInterpolant:
    """Prediction along a path from noise to data; the second half of the output with `learn_sigma` is unused."""

    max_steps: int | None = None
    methods = (Method.ode_euler, Method.ode_heun, Method.ode_dopri5, Method.sde_euler, Method.sde_heun)

    def __init__(self, config: InterpolantConfig, device: torch.device = CPU) -> None:
        self.interpolant = Interpolant(
            config.path, config.prediction, config.weighting, config.train_eps, config.sample_eps
        )

    def losses(self, net: Net, data: Tensor, noise: Tensor, u: Tensor) -> dict[str, Tensor]:
        start, end = self.interpolant.train_interval()
        return {"loss": self.interpolant.losses(first_half(net), noise, data, start + (end - start) * u)}

    def noise_time(self, t: float) -> float:
        # Time runs from noise to data. The network receives it in float32, and before rounding it may exceed 1.
        return 1 - float(np.float32(t))

    def sample(self, net: SamplingNet, noise: Tensor, sampler: SamplerConfig, step_noise: Noise) -> SamplerOutput:
        kind, solver = sampler.method.value.split("_")
        net = first_half(net)
        if kind == "ode":
            points = sampler.steps or 2
            return sample_ode(net, noise, self.interpolant, solver, points, sampler.rtol, sampler.atol)
        return sample_sde(
            net,
            noise,
            self.interpolant,
            step_noise,
            solver,
            sampler.steps or 2,
            sampler.diffusion_form,
            sampler.diffusion_norm,
            sampler.last_step,
            sampler.last_step_size,
        )


def first_half(net: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    """Wrap a network to return only as many channels as its input has."""
    return lambda x, t: net(x, t)[:, : x.shape[1]]


# name -> (config dataclass, class)
OBJECTIVES: dict[str, tuple[type, type]] = {
    "diffusion": (DiffusionConfig, Diffusion),
    "interpolant": (InterpolantConfig, StochasticInterpolant),
}


def build_objective(config: Any, device: torch.device = CPU) -> Objective:
    """Build the objective that `config` (one of the dataclasses in `OBJECTIVES`) describes, for data on `device`."""
    check(config.name in OBJECTIVES, "objective.name", f"one of {sorted(OBJECTIVES)}", config.name)
    config_class, objective = OBJECTIVES[config.name]
    check(type(config) is config_class, "objective.name", f"the name of a {type(config).__name__}", config.name)
    return objective(config, device)
