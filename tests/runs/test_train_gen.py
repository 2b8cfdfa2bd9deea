"""Training a generator: exact resume, the same noise on any number of ranks, samples addressed by index."""

import json

import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

import train_gen
from models import build_model
from tests.processes import run_script
from tests.support import SMALL_DIT, assert_resume_exact, metrics
from vca.config import compose
from vca.data.loader import Batch
from vca.generation.autoencoder import AutoencoderConfig, load_autoencoder
from vca.generation.objective import Method, SamplerConfig, build_objective
from vca.generation.pipeline import check_sampler, guided, sample_latents, save_image_grid, to_uint8
from vca.runtime.errors import ConfigError, NonFiniteError
from vca.training.generation import GenerationDraws, GenerationLoss

pytestmark = pytest.mark.process

# 28 steps of 120 of the 1,438 digits: every cut is in mid-epoch.
LONG = (
    *SMALL_DIT,
    "trainer.global_batch_size=120",
    "trainer.micro_batch_size=20",
    "trainer.steps=28",
    "trainer.checkpoint_every=5",
    "trainer.log_every=2",
    "trainer.eval_every=15",
    "trainer.ema_decay=0.9",
)


PIXELS = load_autoencoder(AutoencoderConfig(channels=1), torch.device("cpu"))


def network(*overrides, **fields):
    """A small network without its zero initialisation, and its config."""
    config = compose("train_gen", [*SMALL_DIT, *overrides])
    torch.manual_seed(0)
    model = build_model(config.model, config.attention).eval()
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model, config


@pytest.mark.parametrize(
    ("ranks", "objective"), [(1, "objective=interpolant"), (2, "objective=diffusion")], ids=["one rank", "two ranks"]
)
def test_resume_after_kill_is_exact(tmp_path, ranks, objective):
    sampler = "sampler.method=ode_euler" if "inter" in objective else "sampler.method=ddim"
    assert_resume_exact(tmp_path, [12], "train_gen.py", *LONG, objective, sampler, ranks=ranks)
    pictures = [sorted((folder / "samples").iterdir()) for folder in (tmp_path / "whole", tmp_path / "broken")]
    assert [path.name for path in pictures[0]] == [f"step_{step:08d}.png" for step in (15, 28)]
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]]


def test_train_gen_losses_independent_of_ranks(tmp_path):
    """The first 20 losses of 1, 2 and 4 ranks at one global batch."""
    losses = {}
    for ranks in (1, 2, 4):
        options = [*LONG, "trainer.micro_batch_size=30", "trainer.steps=20", "trainer.log_every=1"]
        done = run_script(
            "train_gen.py", *options, f"out_dir={tmp_path}", f"name=ranks{ranks}", "trainer.eval_every=0", ranks=ranks
        )
        assert done.returncode == 0, done.stderr[-3000:]
        losses[ranks] = [record["loss"] for record in metrics(tmp_path / f"ranks{ranks}") if "loss" in record]
    assert len(losses[1]) == 20
    for ranks in (2, 4):
        assert losses[ranks] == pytest.approx(losses[1], rel=1e-5)


def test_resume_of_finished_run_returns_result(tmp_path):
    config = compose(
        "train_gen", [*SMALL_DIT, f"out_dir={tmp_path}", "name=run", "trainer.steps=2", "trainer.log_every=1"]
    )
    result = train_gen.run(config)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    *_, last_step, samples = map(json.loads, before.splitlines())
    assert samples.pop("device_hours") > last_step["device_hours"]
    assert samples == {"step": 2, "samples": 10, "nfe": 4}
    assert train_gen.run(config) == result == {"loss": last_step["loss"]}
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def batch_of(count, start=0, seed=5):
    numbers = torch.arange(start, start + count)
    pixels = torch.stack([torch.full((1, 8, 8), float(number)) for number in numbers])
    draws = default_collate([GenerationDraws(seed, (1, 1, 8, 8))(1000 + number) for number in numbers.tolist()])
    return Batch(pixels, numbers % 10, numbers, 1000 + numbers, draws=draws)


def test_generation_loss_draws_independent_of_batch():
    """Time, noise and label of an image depend on its address and the seed, not on its batch."""
    objective = build_objective(network()[1].objective)
    seen = {}

    def record(name):
        class Net(torch.nn.Module):
            def forward(self, x, t, y):
                seen[name] = (x.detach().clone(), t.clone(), y.clone())
                return torch.zeros(len(x), 2, 8, 8)

        return Net()

    loss_of = GenerationLoss(objective, PIXELS, False, class_dropout=0.3, null_label=10)
    loss_of(record("whole"), batch_of(64), step=0)
    loss_of(record("part"), batch_of(10, start=20), step=7)
    for whole, part in zip(seen["whole"], seen["part"], strict=True):
        assert torch.equal(whole[20:30], part)
    loss_of(record("other"), batch_of(64, seed=6), step=0)
    assert not torch.equal(seen["other"][0], seen["whole"][0])
    _, t, y = seen["whole"]
    assert len(set(t.tolist())) > 40
    assert t.min() >= 0
    assert t.max() < 1000
    assert 8 <= (y == 10).sum() <= 32  # 19 of 64 are expected to be dropped
    assert torch.equal(y[y != 10], (torch.arange(64) % 10)[y != 10])
    GenerationLoss(objective, PIXELS, False, 0.0, 10)(record("kept"), batch_of(64), step=0)
    assert torch.equal(seen["kept"][2], torch.arange(64) % 10)


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [
        ("diffusion", SamplerConfig(Method.ddpm, steps=5, cfg_scale=1.5)),
        ("diffusion", SamplerConfig(Method.ddim, steps=5, eta=0.5)),
        ("interpolant", SamplerConfig(Method.ode_heun, steps=5, cfg_scale=2.0)),
        ("interpolant", SamplerConfig(Method.sde_euler, steps=5)),
    ],
)
def test_draw_samples_independent_of_batch(objective, sampler):
    """12 in one batch, or 5 + 7 in another order."""
    model, config = network(f"objective={objective}", f"sampler={'ddim' if objective == 'diffusion' else 'ode_heun'}")
    chosen = build_objective(config.objective)
    check_sampler(chosen, sampler, 0.1)
    labels, shape = torch.arange(12) % 10, (1, 8, 8)
    whole = sample_latents(model, chosen, sampler, labels, range(12), 3, shape)
    late = sample_latents(model, chosen, sampler, labels[5:], range(5, 12), 3, shape)
    early = sample_latents(model, chosen, sampler, labels[:5], range(5), 3, shape)
    torch.testing.assert_close(torch.cat((early.x, late.x)), whole.x, rtol=1e-4, atol=1e-5)
    assert not torch.equal(sample_latents(model, chosen, sampler, labels, range(12), 4, shape).x, whole.x)


def test_guidance_only_inside_interval():
    model, config = network()
    objective = build_objective(config.objective)
    labels, x = torch.tensor([1, 2]), torch.randn(2, 1, 8, 8)
    sampler = SamplerConfig(cfg_scale=3.0, cfg_interval=[0.2, 0.6])
    net = guided(model, objective, sampler, labels)
    with torch.no_grad():
        for t, acts in ((100, False), (200, True), (600, True), (700, False)):
            times = torch.full((2,), t)
            plain, full = model(x, times, labels), model.forward_with_cfg(x, times, labels, 3.0)
            assert not torch.equal(plain, full)
            assert torch.equal(net(x, t), full if acts else plain), t


def test_check_sampler_wrong_objective_refused():
    for name, method, fits in (
        ("diffusion", Method.ddpm, True),
        ("diffusion", Method.ode_heun, False),
        ("interpolant", Method.sde_heun, True),
        ("interpolant", Method.ddim, False),
    ):
        _, config = network(f"objective={name}", "sampler.method=ddim")
        objective, sampler = build_objective(config.objective), SamplerConfig(method, steps=5)
        if fits:
            check_sampler(objective, sampler, 0.1)
        else:
            with pytest.raises(ConfigError, match=r"sampler.method must be one of"):
                check_sampler(objective, sampler, 0.1)


def test_to_uint8_and_save_grid_pixel_values(tmp_path):
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255, 255]
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        to_uint8(torch.tensor([0.0, float("nan")]))
    images = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 3, 4, 6)
    save_image_grid(to_uint8(images), tmp_path / "samples" / "grid.png", columns=3)
    sheet = Image.open(tmp_path / "samples" / "grid.png")
    assert sheet.size == (3 * 7 - 1, 2 * 5 - 1)
    assert sheet.getpixel((0, 0)) == (0, 0, 0)
    assert sheet.getpixel((7, 5)) == (255, 255, 255)
