"""Adding a backbone and an attention takes the files and lines that CONTRIBUTING.md lists, and no other edit.

The attention is CONTRIBUTING.md's template.

Both are added to a copy of the project and trained together; the attention is also used in the other backbones.
"""

import re
import shutil
import sys

import pytest
import torch

from tests.processes import ROOT, run_command
from tests.support import metrics

TEMPLATE = (ROOT / "CONTRIBUTING.md").read_text()
ATTENTION = re.search(r"(?s)```python\n(.*?)```", TEMPLATE)[1]
ATTENTION_YAML = re.search(r"(?s)```yaml\n(.*?)```", TEMPLATE)[1]

BACKBONE = '''"""A backbone with one block over large patches and mean pooling."""

from dataclasses import dataclass

from torch import Tensor, nn

from models.config import BackboneConfig
from models.layers import Backbone, Block, ConvEmbed
from vca.attention import build_attention


@dataclass
class FlatConfig(BackboneConfig):
    """Size."""

    family: str = "flat"
    name: str = "flat_one"
    patch_size: int = 4
    embed_dim: int = 16

    @property
    def size_multiple(self) -> int:
        return self.patch_size


class Flat(Backbone):
    """A backbone of one block."""

    def __init__(self, config, attention):
        super().__init__(config, config.embed_dim, num_prefix_tokens=0)
        self.embed = ConvEmbed(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)
        grid = (config.size[0] // config.patch_size, config.size[1] // config.patch_size)
        attn = build_attention(attention, config.embed_dim, 2, grid, (1, 1))
        self.block = Block(config.embed_dim, attn, 2.0, config.drop_rate, config.drop_path_rate, 1e-6)
        self.add_head()

    def forward_features(self, x: Tensor) -> Tensor:
        self.check_images(x)
        x, grid = self.embed(x)
        return self.run_block(self.block, x, grid)
'''


pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """The project with `sharp` and `flat` added."""
    root = tmp_path_factory.mktemp("extended")
    for name in ("vca", "models", "configs", "scripts"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train_cls.py", "train_gen.py"):
        shutil.copy(ROOT / name, root)
    (root / "vca" / "attention" / "comparison" / "sharp.py").write_text(ATTENTION)
    (root / "configs" / "attention" / "sharp.yaml").write_text(ATTENTION_YAML)
    (root / "models" / "flat.py").write_text(BACKBONE)
    (root / "configs" / "model" / "flat_one.yaml").write_text(
        "defaults:\n  - flat_schema\n  - _self_\n\nname: flat_one\n"
    )

    # A size that extends another one.
    size = "defaults:\n  - deit_tiny\n  - _self_\n\nname: deit_tiny_64\ncontrast_grid: [8, 8]\n"
    (root / "configs" / "model" / "deit_tiny_64.yaml").write_text(size)

    register(
        root / "vca" / "attention" / "__init__.py",
        "vca.attention.comparison.sharp",
        "SharpConfig, SharpAttention",
        "sharp",
    )
    register(root / "models" / "__init__.py", "models.flat", "FlatConfig, Flat", "flat")
    return root


def register(file, module, names, key):
    """Add the line in a registry, and its import."""
    text = file.read_text()
    opening = next(line for line in text.splitlines() if line.endswith("= {") and line[:4].isupper())
    text = text.replace(opening, f'{opening}\n    "{key}": ({names}),', 1)
    file.write_text(
        text.replace("from torch import nn\n", f"from torch import nn\n\nfrom {module} import {names}\n", 1)
    )


def python(root, *arguments):
    done = run_command(sys.executable, *arguments, cwd=root, PYTHONPATH=str(root))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_extension_new_model_and_attention_train(extended, tmp_path):
    options = [
        "trainer.steps=2",
        "trainer.log_every=1",
        "trainer.device=cpu",
        "trainer.workers=0",
        f"out_dir={tmp_path}",
    ]
    python(extended, "train_cls.py", "model=flat_one", "attention=sharp", "attention.gain=0.5", "name=new", *options)
    steps = [record["step"] for record in metrics(tmp_path / "new") if "loss" in record]
    assert steps == [1, 2]
    state = torch.load(tmp_path / "new" / "checkpoints" / "step_00000002.pt", weights_only=True)["model"]
    assert state["block.attn.gain"].shape == (2, 1, 1)
    assert "block.attn.local.weight" in state


def test_extension_works_in_timm_and_complexity(extended):
    """The new attention works in the other backbones, the new backbone in timm, and both in scripts/complexity.py."""
    expected = {
        "vca_flat_one_224": 1,
        "vca_deit_tiny_64_patch16_224": 12,
        "vca_deit_tiny_patch16_224": 12,
        "vca_swin_tiny_patch4_window7_224": 10,  # stages 1 to 3
        "vca_cswin_tiny_224": 6,  # stages 1 and 2
        "vca_pvt_tiny_224": 8,
    }
    code = f"""
import models, timm, torch
models.register_timm()
with torch.device("meta"):
    for name in {list(expected)}:
        network = timm.create_model(name, attention={{"name": "sharp", "gain": 2.0}}, num_classes=3)
        print(name, [type(m).__name__ for m in network.modules()].count("SharpAttention"))

from scripts.complexity import complexity_of
print("params", complexity_of("flat_one", "sharp").params)
"""
    found = dict(line.split() for line in python(extended, "-c", code).splitlines())
    assert int(found.pop("params")) > 0
    assert found == {name: str(layers) for name, layers in expected.items()}
