"""Experiments of published attentions: parameters and multiply-adds of the original models."""

import re
import sys

import pytest

import train_cls
import train_gen
from models import build_model
from scripts import complexity
from tests.config.test_recipes import IMAGENET
from tests.processes import ROOT
from vca.config import compose
from vca.evaluation.complexity import count, example_inputs
from vca.runtime.errors import ConfigError

# Experiment -> parameters, and multiply-adds of matrix products and convolutions, counted with the original code.
ORIGINALS = {
    "circulant_deit_tiny": (6_140_200, 1_197_470_208),
    "circulant_deit_small": (23_780_968, 4_723_565_568),
    "ttt_deit_tiny": (6_149_416, 1_218_791_424),
    "ttt_deit_small": (23_799_400, 4_807_495_680),
    "inline_deit_tiny": (6_477_736, 1_109_155_584),
    "inline_deit_small": (16_734_760, 4_965_812_480),
    "mhla_deit_tiny": (5_793_832, 1_525_624_320),
    "mhla_deit_small": (22_200_424, 5_769_157_632),
    "linear_relu_deit_tiny": (5_709_928, 1_127_797_248),
    "linear_relu_deit_small": (22_035_688, 4_336_493_568),
    "ttt_dit_s_2": (34_788_128, 6_219_055_104),
    "ttt_dit_b_2": (134_152_736, 23_330_095_104),
    "mhla_dit_s_2": (33_021_728, 5_690_277_888),
    "polaformer_pvt_tiny": (12_924_648, 2_256_500_224),
    "inline_pvt_tiny": (12_032_232, 1_975_843_840),
}
FOLDER = ROOT / "configs" / "experiment" / "published"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_published_experiments_all_counted():
    assert sorted(ORIGINALS) == FILES


@pytest.mark.process
@pytest.mark.parametrize("name", FILES)
def test_published_experiment_counts_equal_original(name):
    script, module = ("train_gen", train_gen) if "_dit_" in name else ("train_cls", train_cls)
    module.register_configs()
    config = compose(script, [f"experiment=published/{name}", "data.root=images"])
    counts = count(lambda: build_model(config.model, config.attention), lambda: example_inputs(config.model))
    images = 400_000 * 256 if script == "train_gen" else IMAGENET * config.trainer.epochs
    (hours,) = re.findall(r"# About (\d+) GPU-hours: an estimate", (FOLDER / f"{name}.yaml").read_text())
    assert int(hours) == pytest.approx(6 * counts.macs * images / 40e12 / 3600, abs=0.6)
    params, macs = ORIGINALS[name]
    # InLine's PVT has 1,024 parameters less, as many as the final norm.
    assert counts.params == params + (1024 if name == "inline_pvt_tiny" else 0)
    if name.startswith("circulant"):
        # The original projects the half spectrum, 2 x 14 x 8 real rows instead of 196; FFTs are not counted.
        macs -= config.model.depth * 3 * (2 * 14 * 8 - 14 * 14) * config.model.embed_dim**2
    assert counts.macs == pytest.approx(macs, rel=2e-3)  # here, denominators are sums and not matrix products


def test_complexity_size_that_a_model_refuses_is_a_line(monkeypatch, capsys):
    """The other models are counted; a wrong size is an error."""
    arguments = ["complexity.py", "--model", "cswin_tiny", "deit_tiny", "--attention", "softmax", "--size"]
    monkeypatch.setattr(sys, "argv", [*arguments, "512"])
    complexity.main()
    _, refused, counted = capsys.readouterr().out.splitlines()
    assert refused.endswith("model.img_size must be a multiple of 224, such as 448 or 672, got 512")
    assert counted.split()[:3] == ["deit_tiny", "3x512x512", "softmax"]
    monkeypatch.setattr(sys, "argv", [*arguments, "large"])
    with pytest.raises(SystemExit, match="2"):
        complexity.main()
    assert "argument --size: invalid int value: 'large'" in capsys.readouterr().err


def test_complexity_with_overrides(monkeypatch, capsys):
    """The default 7 x 7 pieces of MHLA do not divide 32 x 32 tokens; a wrong key is an error."""
    command = ["complexity.py", "--model", "deit_tiny", "--attention", "mhla", "--size", "512", "--"]
    monkeypatch.setattr(sys, "argv", [*command, "model.contrast_grid=[8,8]"])
    complexity.main()
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["deit_tiny", "3x512x512", "mhla"]
    monkeypatch.setattr(sys, "argv", [*command, "model.contrast=[8,8]"])
    with pytest.raises(ConfigError, match=r"unknown key 'model\.contrast'; did you mean 'model\.contrast_grid'"):
        complexity.main()
