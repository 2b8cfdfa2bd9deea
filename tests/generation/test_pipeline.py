"""Sampling: no read from the device between network calls, no call too many, noise drawn ahead."""

import threading

import pytest
import torch

from models import build_model
from tests.host_reads import HostReads
from tests.support import SMALL_DIT
from vca.config import compose
from vca.generation.objective import Method, SamplerConfig, build_objective
from vca.generation.pipeline import StepNoise, sample_latents

SHAPE = (1, 8, 8)
# method -> settings, NFE
METHODS = {
    Method.ddpm: ({"steps": 5}, 5),
    Method.ddim: ({"steps": 5, "eta": 0.5}, 5),
    Method.ode_euler: ({"steps": 6}, 5),
    Method.ode_heun: ({"steps": 4}, 6),
    Method.sde_euler: ({"steps": 5}, 5),
    Method.sde_heun: ({"steps": 4}, 7),
}
# settings -> fraction of the calls with guidance, or None where it depends on the sampler
GUIDANCE = {
    "none": ({}, 0.0),
    "everywhere": ({"cfg_scale": 1.5}, 1.0),
    "interval": ({"cfg_scale": 1.5, "cfg_interval": [0.2, 0.7]}, None),
    "nowhere": ({"cfg_scale": 1.5, "cfg_interval": [0.501, 0.502]}, 0.0),
}


def generator(method):
    name = "diffusion" if method in (Method.ddpm, Method.ddim) else "interpolant"
    fitting = "ddpm" if name == "diffusion" else "ode_heun"
    config = compose("train_gen", [*SMALL_DIT, f"objective={name}", f"sampler={fitting}"])
    model = build_model(config.model, config.attention).eval()
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model, build_objective(config.objective)


class CallReads(HostReads):
    """Counts between the first and the last call of a network; `batches` are the batch sizes of the calls."""

    def __init__(self, monkeypatch, model):
        super().__init__(monkeypatch)
        self.batches = []
        model.register_forward_pre_hook(lambda module, arguments: self.batches.append(len(arguments[0])))

    @property
    def place(self):
        return len(self.batches) or None


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("method", METHODS)
def test_sampling_never_waits_between_calls(monkeypatch, method, guidance):
    """Nor is the network called, or its batch doubled, where the sampler does not need it."""
    (settings, nfe), (guided, fraction) = METHODS[method], GUIDANCE[guidance]
    sampler = SamplerConfig(method, **settings, **guided)
    model, objective = generator(method)
    labels = torch.tensor([1, 2, 3])
    with CallReads(monkeypatch, model) as reads:
        output = sample_latents(model, objective, sampler, labels, range(3), 0, SHAPE)
    assert output.nfe == len(reads.batches) == nfe
    assert {call for call, _ in reads.counts} <= {nfe}, reads.counts
    doubled = reads.batches.count(6)
    assert set(reads.batches) <= {3, 6}
    assert 0 < doubled < nfe if fraction is None else doubled == fraction * nfe


def test_noise_time_of_float32_time():
    """The sum of a time and a step of Heun's method may exceed 1, but not after rounding to float32."""
    objective = build_objective(
        compose("train_gen", [*SMALL_DIT, "objective=interpolant", "sampler=ode_heun"]).objective
    )
    assert objective.noise_time(1.0000000000000002) == 0
    assert objective.noise_time(0.7) == 1 - torch.tensor(0.7).double().item()


@pytest.mark.parametrize(
    ("sampler", "needs"),
    [
        (SamplerConfig(Method.ddpm, steps=4), True),
        (SamplerConfig(Method.ddim, steps=4, eta=1.0), True),
        (SamplerConfig(Method.ddim, steps=4), False),
        (SamplerConfig(Method.ode_heun, steps=4), False),
        (SamplerConfig(Method.ode_dopri5, steps=None), False),
        (SamplerConfig(Method.sde_heun, steps=5), True),
    ],
    ids=lambda value: getattr(getattr(value, "method", None), "value", None),
)
def test_step_noise_drawn_in_thread_only_if_needed(monkeypatch, sampler, needs):
    threads, draw = [], StepNoise.draw

    def watched(noise):
        threads.append(threading.current_thread() is threading.main_thread())
        return draw(noise)

    monkeypatch.setattr(StepNoise, "draw", watched)
    model, objective = generator(sampler.method)
    sample_latents(model, objective, sampler, torch.tensor([1]), range(1), 0, SHAPE)
    assert threads[:5] == ([True, True, False, False, False] if needs else [True])


def test_step_noise_equals_draws_in_order():
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    plain = generators()
    with StepNoise(generators(), SHAPE, torch.device("cpu")) as noise:
        drawn = [noise.initial(), *(noise(step) for step in range(6))]
    for batch in drawn:
        assert torch.equal(batch, torch.stack([torch.randn(SHAPE, generator=each) for each in plain]))
