"""Objectives and samplers of generation: against the original code's figures, and against closed forms."""

import math

import numpy as np
import pytest
import torch

from tests.support import GOLDEN
from vca.generation.diffusion import GaussianDiffusion, linear_betas, respaced_steps
from vca.generation.interpolant import DiffusionForm, Interpolant, PathType, Prediction, Weighting, coefficients
from vca.generation.samplers import sample_ddim, sample_ddpm, sample_ode, sample_sde


def golden(name):
    file = np.load(GOLDEN / f"{name}.npz")
    return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def close(one, other, rel=1e-5):
    return (one - other).abs().max() <= rel * other.abs().max()


def toy_diffusion_net(x, t):
    s = (t.to(x.dtype) / 1000).reshape(-1, 1, 1, 1)
    return torch.cat((x.tanh() * (3 * s).cos() + 0.3 * x * s, (x + s).sin()), dim=1)


def toy_transport_net(x, t):
    t = t.reshape(-1, 1, 1, 1)
    return x.tanh() * (2 * t).cos() - 0.5 * x * t


def timed(net):
    """Let a net of times `(B,)` receive the one time of a sampler, a Python number."""
    return lambda x, t: net(x, torch.full((len(x),), t))


# Diffusion


def test_diffusion_schedule_equals_original():
    expected, diffusion = golden("gaussian_diffusion"), GaussianDiffusion(linear_betas())
    for key in ("betas", "alphas_cumprod", "posterior_variance"):
        torch.testing.assert_close(getattr(diffusion, key), expected[key], rtol=1e-12, atol=0)
    chain = diffusion.respaced(25)
    assert chain.numbers == expected["respaced_25_timesteps"].tolist()
    torch.testing.assert_close(chain.betas, expected["respaced_25_betas"], rtol=1e-10, atol=0)


def test_diffusion_tables_moved_once():
    """No step copies them: they are on the device of the chain, also in a shorter one."""
    meta = GaussianDiffusion(linear_betas(), device=torch.device("meta"))
    for diffusion in (meta, meta.respaced(250)):
        tables = [value for name, value in vars(diffusion).items() if isinstance(value, torch.Tensor)]
        assert len([table for table in tables if table.is_meta]) == len(tables) - 1 == 12  # all but `levels`
        x, t = torch.zeros(2, 1, 4, 4, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
        assert diffusion.losses(lambda x, t: torch.cat((x, x), dim=1), x, t, x)["loss"].is_meta
        assert diffusion.ddpm_step(lambda x, t: torch.cat((x, x), dim=1), x, 3, x).is_meta
        assert diffusion.ddim_step(lambda x, t: torch.cat((x, x), dim=1), x, 3, x, 1.0).is_meta


def test_diffusion_losses_equal_original():
    expected, diffusion = golden("gaussian_diffusion"), GaussianDiffusion(linear_betas())
    x0, t, noise = expected["x0"], expected["t"], expected["noise"]
    assert close(diffusion.add_noise(x0, t, noise), expected["x_t"])
    losses = diffusion.losses(toy_diffusion_net, x0, t, noise)
    for key in ("mse", "vb", "loss"):
        torch.testing.assert_close(losses[key], expected[key], rtol=1e-5, atol=0)


def test_diffusion_vb_gradient_skips_mean():
    """The gradient of `vb` reaches the variance half of the output only."""
    expected, diffusion = golden("gaussian_diffusion"), GaussianDiffusion(linear_betas())
    out = toy_diffusion_net(expected["x_t"], expected["t"]).requires_grad_()
    losses = diffusion.losses(lambda x, t: out, expected["x0"], expected["t"], expected["noise"])
    (gradient,) = torch.autograd.grad(losses["vb"].sum(), out)
    mean, variance = gradient.chunk(2, dim=1)
    assert not mean.any()
    assert variance.abs().sum() > 0


def test_sample_ddpm_and_ddim_equal_original():
    expected, diffusion = golden("gaussian_diffusion"), GaussianDiffusion(linear_betas())
    ddpm = sample_ddpm(
        timed(toy_diffusion_net), expected["ddpm_25_xT"], diffusion, 25, lambda i: expected["ddpm_25_z"][i]
    )
    assert close(ddpm.x, expected["ddpm_25_x0"])
    ddim = sample_ddim(timed(toy_diffusion_net), expected["ddpm_25_xT"], diffusion, 25)
    assert close(ddim.x, expected["ddim_25_x0"])
    assert ddpm.nfe == ddim.nfe == 25


def test_respaced_steps_every_count_accumulates_stride():
    """DiT adds the stride up in float64 and rounds each sum: 278 of the counts differ from rounding a product."""
    differ = 0
    for count in range(1, 1001):
        stride = 999 / max(1, count - 1)
        sums = np.rint(np.cumsum(np.r_[0.0, np.full(count - 1, stride)])).astype(int).tolist()
        assert respaced_steps(1000, count) == sums, count
        assert len(set(sums)) == count
        assert sums[-1] == (999 if count > 1 else 0)
        differ += sums != [round(index * stride) for index in range(count)]
        if count in (50, 100, 250, 1000):
            assert sums == [round(index * stride) for index in range(count)]
    assert differ == 278


def test_respaced_steps_valid_and_invalid_counts():
    assert respaced_steps(1000, 1) == [0]
    assert respaced_steps(10, 10) == list(range(10))
    assert respaced_steps(1000, 250)[::249] == [0, 999]
    for count in (0, 1001):
        with pytest.raises(ValueError, match=rf"from 1 to 1000, got {count}"):
            respaced_steps(1000, count)
    with pytest.raises(ValueError, match="noise must be given"):
        sample_ddim(timed(toy_diffusion_net), torch.zeros(1, 1, 2, 2), GaussianDiffusion(linear_betas()), 5, eta=1.0)


# Interpolants

CASES = {
    "Linear_velocity_None": Interpolant(),
    "GVP_velocity_None": Interpolant(PathType.gvp),
    "Linear_noise_velocity": Interpolant(PathType.linear, Prediction.noise, Weighting.velocity),
}
FORMS = {
    "SBDM": DiffusionForm.sbdm,
    "sigma": DiffusionForm.sigma,
    "constant": DiffusionForm.constant,
    "linear": DiffusionForm.linear,
    "decreasing": DiffusionForm.decreasing,
}


@pytest.mark.parametrize("case", CASES)
def test_interpolant_equals_original(case):
    expected, interpolant = golden("transport"), CASES[case]
    noise, data, t = (expected[key] for key in ("x0", "x1", "t"))
    xt, velocity = interpolant.mix(noise, data, t)
    assert close(xt, expected[f"{case}_xt"])
    assert close(velocity, expected[f"{case}_ut"])
    assert close(interpolant.losses(toy_transport_net, noise, data, t), expected[f"{case}_loss"])
    out = toy_transport_net(xt, t)
    assert close(interpolant.velocity(out, xt, t), expected[f"{case}_ode_drift"])
    assert close(interpolant.score(out, xt, t), expected[f"{case}_score"])
    for name, form in FORMS.items():
        w = interpolant.diffusion(form, 1.0, xt, t)
        assert close(w, expected[f"{case}_diffusion_{name}"].expand_as(w)), name


@pytest.mark.parametrize("case", CASES)
def test_sample_ode_equals_original(case):
    expected, interpolant = golden("transport"), CASES[case]
    start = expected[f"{case}_init"]
    for method, points, key, nfe in (("euler", 20, "euler20", 19), ("heun", 20, "heun220", 38)):
        samples = sample_ode(timed(toy_transport_net), start, interpolant, method, points)
        assert close(samples.x, expected[f"{case}_ode_{key}"]), method
        assert samples.nfe == nfe
    samples = sample_ode(timed(toy_transport_net), start, interpolant)
    assert close(samples.x, expected[f"{case}_ode_dopri52"])
    assert samples.nfe > 6


def test_sample_sde_equals_original():
    expected, case = golden("transport"), "Linear_velocity_None"
    noise = expected[f"{case}_sde_euler30_z"]
    samples = sample_sde(
        timed(toy_transport_net), expected[f"{case}_init"], Interpolant(), lambda i: noise[i], points=30
    )
    assert close(samples.x, expected[f"{case}_sde_euler30_x"])
    assert samples.nfe == 30


@pytest.mark.parametrize("path", PathType)
def test_interpolant_coefficients_equal_autograd(path):
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    c = coefficients(path, t)
    for value, derivative in ((c.alpha, c.d_alpha), (c.sigma, c.d_sigma)):
        (expected,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative, expected)
    torch.testing.assert_close(c.ratio, c.d_alpha / c.alpha)


# A Gaussian target, of which everything is known: data N(MEAN, STD^2), elementwise.
MEAN, STD = 0.7, 0.4


def exact_net(interpolant):
    """The best prediction of a Gaussian target, in what the interpolant's network is to predict."""

    def net(x, t):
        c = interpolant.at(t.double(), x)
        variance = c.alpha**2 * STD**2 + c.sigma**2
        score = -(x - c.alpha * MEAN) / variance
        if interpolant.prediction is Prediction.score:
            return score
        if interpolant.prediction is Prediction.noise:
            return -c.sigma * score
        # E[d_alpha data + d_sigma noise | x], written so that it holds at t = 0 too
        rate = (c.alpha * c.d_alpha * STD**2 + c.sigma * c.d_sigma) / variance
        return c.d_alpha * MEAN + rate * (x - c.alpha * MEAN)

    return net


@pytest.mark.parametrize("path", PathType)
@pytest.mark.parametrize("prediction", Prediction)
def test_interpolant_predictions_agree(path, prediction):
    """Noise, score and velocity of the same target stand for the same velocity and score."""
    x, t = torch.randn(9, 1, 2, 2, dtype=torch.float64), torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    one, other = Interpolant(path), Interpolant(path, prediction)
    expected, out = exact_net(one)(x, t), exact_net(other)(x, t)
    torch.testing.assert_close(other.velocity(out, x, t), expected)
    torch.testing.assert_close(other.score(out, x, t), one.score(expected, x, t))


def order(errors):
    """Rate at which errors fall when the step is halved, from the last two of them."""
    return math.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize(("method", "expected"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("path", [PathType.linear, PathType.gvp])
def test_sample_ode_order_of_convergence(path, method, expected):
    """The flow of a Gaussian target is x -> MEAN + STD x."""
    interpolant, x = Interpolant(path), torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1, 1)
    errors = []
    for points in (65, 129, 257):
        end = sample_ode(timed(exact_net(interpolant)), x, interpolant, method, points).x
        errors.append((end - (MEAN + STD * x)).abs().max().item())
    assert order(errors) == pytest.approx(expected, abs=0.15), errors


def test_sample_ode_adaptive_within_tolerance():
    interpolant, x = Interpolant(), torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1, 1)
    for rtol in (1e-3, 1e-5, 1e-7):
        samples = sample_ode(timed(exact_net(interpolant)), x, interpolant, rtol=rtol, atol=rtol)
        assert (samples.x - (MEAN + STD * x)).abs().max() < 20 * rtol


def final_moments(sampler, steps):
    """Mean and standard deviation of what a linear sampler makes of standard normal noise, without drawing any.

    The result is `c + g x + sum g_k z_k`: row 0 of the batch shows c, row 1 g, and each further row one g_k.
    """
    x = torch.zeros(2 + steps, 1, 1, 1, dtype=torch.float64)
    x[1] = 1

    def noise(step):
        z = torch.zeros_like(x)
        z[2 + step] = 1
        return z

    end = sampler(x, noise).x.flatten()
    return end[0].item(), (end[1:] - end[0]).square().sum().sqrt().item()


@pytest.mark.parametrize("form", [DiffusionForm.sigma, DiffusionForm.linear, DiffusionForm.constant])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_sample_sde_order_of_convergence(method, form):
    """Mean and spread of the samples converge to the target's, at least with first order."""
    interpolant, errors = Interpolant(), []
    for points in (129, 257, 513):

        def sampler(x, noise, points=points):
            return sample_sde(
                timed(exact_net(interpolant)),
                x,
                interpolant,
                noise,
                method,
                points,
                form,
                last_step="euler",
                last_step_size=1e-5,
            )

        mean, std = final_moments(sampler, points - 1)
        errors.append(max(abs(mean - MEAN), abs(std - STD)))
    assert errors[-1] < 5e-3
    assert order(errors) > 0.85, errors


@pytest.mark.parametrize("last_step", ["mean", "euler", "tweedie", None])
def test_sample_sde_last_step_reaches_target(last_step):
    """Each of them ends near the target; what it leaves out shows in the spread only."""
    interpolant, nfe = Interpolant(), []

    def sampler(x, noise):
        samples = sample_sde(timed(exact_net(interpolant)), x, interpolant, noise, points=501, last_step=last_step)
        nfe.append(samples.nfe)
        return samples

    mean, std = final_moments(sampler, 500)
    assert nfe == [500 + (last_step is not None)]
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert std == pytest.approx(STD, abs=0.02)


def exact_noise(diffusion):
    """Network of a diffusion whose data are N(MEAN, STD^2), with the smaller of its two variances."""

    def net(x, t):
        level = diffusion.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        noise = (1 - level).sqrt() * (x - level.sqrt() * MEAN) / (level * STD**2 + 1 - level)
        return torch.cat((noise, -torch.ones_like(noise)), dim=1)

    return net


def test_sample_ddim_converges_to_flow():
    """With more steps DDIM ends where the probability flow of the 1000-step noise does: first order."""
    diffusion = GaussianDiffusion(linear_betas(10_000))
    errors = []
    for steps in (50, 100, 200, 400):
        mean, std = final_moments(
            lambda x, noise, steps=steps: sample_ddim(timed(exact_noise(diffusion)), x, diffusion, steps), 0
        )
        errors.append(max(abs(mean - MEAN), abs(std - STD)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 5e-3
    assert order(errors) > 0.8, errors


def test_sample_ddpm_converges_to_target():
    """Mean and spread of ancestral sampling approach the target's as the steps grow in number."""
    diffusion = GaussianDiffusion(linear_betas())
    errors = []
    for steps in (25, 50, 100, 200):

        def sampler(x, noise, steps=steps):
            return sample_ddpm(timed(exact_noise(diffusion)), x, diffusion, steps, noise)

        mean, std = final_moments(sampler, steps)
        errors.append(max(abs(mean - MEAN), abs(std - STD)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02
    assert order(errors) > 0.8, errors


def test_samplers_wrong_options_refused():
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="must be euler, heun or dopri5, got 'rk4'"):
        sample_ode(timed(toy_transport_net), x, Interpolant(), "rk4")
    with pytest.raises(ValueError, match="must be euler or heun, got 'dopri5'"):
        sample_sde(timed(toy_transport_net), x, Interpolant(), lambda i: x, "dopri5")
    with pytest.raises(ValueError, match="must be mean, euler, tweedie or None, got 'none'"):
        sample_sde(timed(toy_transport_net), x, Interpolant(), lambda i: x, last_step="none")
    with pytest.raises(ValueError, match="points must be >= 2, got 1"):
        sample_ode(timed(toy_transport_net), x, Interpolant(), "euler", 1)
