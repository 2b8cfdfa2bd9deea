"""Gaussian diffusion with learned range variance, as in DiT.

Equations: "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672, IDDPM) and "Denoising Diffusion
Implicit Models" (arXiv 2010.02502, DDIM). With a = cumulative product of 1 - beta:

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e                              the noisy input
    e^, v = net(x_t, t)                                                the network: noise, and variance interpolation
    log var = f log beta_t + (1 - f) log posterior_t, f = (v + 1) / 2  between its bounds (IDDPM, 15)
    loss = |e - e^|^2 + KL(q(x_t-1 | x_t, x_0) || p(x_t-1 | x_t))      in bits, the mean of p held fixed (IDDPM, 16)

Shape letters: B batch, I channels of x. `net(x, t)` maps `(B, I, H, W)` and step numbers to `(B, 2I, H, W)`: `(B,)` in
training, and in sampling one Python number for the whole batch, which is known without a read from the device.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, repeat

import torch
from torch import Tensor

Net = Callable[[Tensor, Tensor], Tensor]
SamplingNet = Callable[[Tensor, float], Tensor]
CPU = torch.device("cpu")


def linear_betas(steps: int = 1000) -> Tensor:
    """Return betas `(steps,)` float64: 1e-4 to 0.02 for 1000 steps, rescaled to the same total for other lengths."""
    scale = 1000 / steps
    return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)


def respaced_steps(num_steps: int, count: int) -> list[int]:
    """Return `count` of `num_steps` step numbers, evenly spaced, including the first and the last.

    The stride is accumulated and each sum is rounded, as DiT's `space_timesteps` does: 278 of the counts from 1 to 1000
    differ from rounding `index * stride`.
    """
    if not 1 <= count <= num_steps:
        raise ValueError(f"the number of sampling steps must be from 1 to {num_steps}, got {count}")
    stride = (num_steps - 1) / (count - 1) if count > 1 else 1.0
    return [round(position) for position in accumulate(repeat(stride, count - 1), initial=0.0)]


class GaussianDiffusion:
    """Diffusion chain; `respaced` returns a shorter one.

    The coefficients are tables of float64. They are computed on the CPU and moved to the device once, so that no step
    copies from the host. A step index `t` is `(B,)`, or a Python number for the whole batch.

    Args:
        betas: `(S,)` float64, on the CPU.
        numbers: S step numbers that the network receives; 0, 1, ... if None.
        device: device of the steps.
    """

    def __init__(self, betas: Tensor, numbers: Sequence[int] | None = None, device: torch.device = CPU) -> None:
        betas = betas.double()
        levels = torch.cumprod(1 - betas, 0)
        before = torch.cat((torch.ones(1, dtype=torch.float64), levels[:-1]))
        after = 1 - levels
        variance = betas * (1 - before) / after
        # The first is 0 and has no logarithm: use the second, or beta in a chain of one step.
        log_variance = torch.cat((variance[1:2] if len(betas) > 1 else betas, variance[1:])).log()

        self.device = device
        self.levels = levels  # on the CPU, for `respaced`
        self.numbers = list(range(len(betas)) if numbers is None else numbers)
        self.number_table = torch.tensor(self.numbers).to(device)
        tables = (
            betas,
            betas.log(),
            levels,
            before,
            after,
            levels.rsqrt(),
            (1 / levels - 1).sqrt(),
            variance,
            log_variance,
            betas * before.sqrt() / after,
            (1 - before) * (1 - betas).sqrt() / after,
        )
        (
            self.betas,
            self.log_betas,
            self.alphas_cumprod,
            self.alphas_cumprod_before,
            self.one_minus_alphas_cumprod,
            self.rsqrt_alphas_cumprod,
            self.noise_to_signal,
            self.posterior_variance,
            self.posterior_log_variance,
            self.posterior_mean_x0,
            self.posterior_mean_xt,
        ) = torch.stack(tables).to(device)

    def __len__(self) -> int:
        return len(self.numbers)

    def respaced(self, count: int) -> "GaussianDiffusion":
        """Return the chain of `count` of the steps, which keep their noise levels."""
        kept = respaced_steps(len(self), count)
        levels = self.levels[kept]
        before = torch.cat((torch.ones(1, dtype=torch.float64), levels[:-1]))
        return GaussianDiffusion(1 - levels / before, [self.numbers[index] for index in kept], self.device)

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return `x_t` for step indices `t`."""
        level = at(self.alphas_cumprod, t, x0), at(self.one_minus_alphas_cumprod, t, x0)
        return level[0].sqrt() * x0 + level[1].sqrt() * noise

    def posterior_mean(self, x0: Tensor, xt: Tensor, t: Tensor | int) -> Tensor:
        """Return the mean of `q(x_t-1 | x_t, x_0)`."""
        return at(self.posterior_mean_x0, t, x0) * x0 + at(self.posterior_mean_xt, t, x0) * xt

    def predict_x0(self, xt: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """Return `x_0` from `x_t` and its noise."""
        return at(self.rsqrt_alphas_cumprod, t, xt) * xt - at(self.noise_to_signal, t, xt) * noise

    def log_variance(self, fraction: Tensor, t: Tensor | int) -> Tensor:
        """Return the log variance of `p(x_t-1 | x_t)` from the second half of the network's output, in [-1, 1]."""
        low, high = at(self.posterior_log_variance, t, fraction), at(self.log_betas, t, fraction)
        part = (fraction + 1) / 2
        return part * high + (1 - part) * low

    def losses(self, net: Net, x0: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Return `mse`, `vb` (bits per dimension) and their sum `loss`, each `(B,)`, for step indices `t`."""
        xt = self.add_noise(x0, t, noise)
        predicted, fraction = net(xt, self.number_table[t]).float().chunk(2, dim=1)
        mse = mean_flat((noise - predicted) ** 2)
        vb = self.variational_bound(x0, xt, t, predicted.detach(), fraction)
        return {"mse": mse, "vb": vb, "loss": mse + vb}

    def variational_bound(self, x0: Tensor, xt: Tensor, t: Tensor, noise: Tensor, fraction: Tensor) -> Tensor:
        """Return one term of the bound in bits per dimension: the KL, or at step 0 the likelihood of 8-bit pixels."""
        mean = self.posterior_mean(self.predict_x0(xt, t, noise), xt, t)
        log_variance = self.log_variance(fraction, t)
        true_log_variance = at(self.posterior_log_variance, t, x0)
        kl = normal_kl(self.posterior_mean(x0, xt, t), true_log_variance, mean, log_variance)
        likelihood = discretized_log_likelihood(x0, mean, 0.5 * log_variance)
        return torch.where(t == 0, -mean_flat(likelihood), mean_flat(kl)) / math.log(2)

    def ddpm_step(self, net: SamplingNet, xt: Tensor, index: int, noise: Tensor) -> Tensor:
        """Take one ancestral step from `x_t` to `x_t-1`; the last one adds no noise."""
        predicted, fraction = net(xt, self.numbers[index]).chunk(2, dim=1)
        mean = self.posterior_mean(self.predict_x0(xt, index, predicted), xt, index)
        return mean + (index > 0) * (0.5 * self.log_variance(fraction, index)).exp() * noise

    def ddim_step(self, net: SamplingNet, xt: Tensor, index: int, noise: Tensor, eta: float = 0.0) -> Tensor:
        """Take one DDIM step (equations 12 and 16); `eta=0` is deterministic. The predicted variance is not used."""
        predicted = net(xt, self.numbers[index])[:, : xt.shape[1]]
        level, before = at(self.alphas_cumprod, index, xt), at(self.alphas_cumprod_before, index, xt)
        sigma = eta * ((1 - before) / (1 - level)).sqrt() * (1 - level / before).sqrt()
        mean = before.sqrt() * self.predict_x0(xt, index, predicted) + (1 - before - sigma**2).sqrt() * predicted
        return mean + (index > 0) * sigma * noise


def at(table: Tensor, t: Tensor | int, like: Tensor) -> Tensor:
    """Return entries `t` `(B,)`, or one, of a float64 table in the dtype of `like`, shaped `(B or 1, 1, 1, ...)`."""
    return table[t].to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def mean_flat(x: Tensor) -> Tensor:
    """Average over all dimensions except the first."""
    return x.flatten(1).mean(1)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Return `KL(N1 || N2)` of diagonal normal distributions, elementwise, in nats."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.exp() - 1 - ratio + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log probability of the 8-bit bin of `x` in [-1, 1] under a normal distribution, elementwise, in nats.

    The first and the last bin extend to infinity. The normal CDF is GELU's tanh approximation, as in the original.
    """

    def cdf(x: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    centered, inverse = x - mean, (-log_scale).exp()
    upper, lower = cdf(inverse * (centered + 1 / 255)), cdf(inverse * (centered - 1 / 255))
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return inside.clamp(min=1e-12).log()
