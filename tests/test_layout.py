"""Layout of the project: import rules, requirements, consistency of its files."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter

import pytest
import yaml

from tests.processes import ROOT, environment, run_command

STANDARD = set(sys.stdlib_module_names)
SCIENTIFIC = {"torch", "torchvision", "timm", "numpy", "scipy", "PIL", "sklearn", "matplotlib", "safetensors"}

# Packages of vca from the bottom up -> their third-party imports. Each may import those before it, except the first
# three, which import none of vca.
THIRD_PARTY = {
    "attention": {"torch", "triton"},  # triton in the kernels only
    "runtime": {"torch", "numpy", "PIL", "tqdm", "wandb"},  # the last four inside functions only
    "metrics": {"torch", "numpy", "scipy"},
    "data": SCIENTIFIC | {"pyarrow"},
    "generation": {"torch", "numpy", "PIL", "torchdiffeq", "diffusers"},
    "training": SCIENTIFIC,
    "evaluation": SCIENTIFIC | {"torch_fidelity"},
    "report": SCIENTIFIC | {"bokeh", "jinja2", "huggingface_hub"},
    "config": {"hydra", "omegaconf", "yaml"},
    "sweep": {"hydra", "omegaconf", "submitit"},
    "cli": {"hydra", "omegaconf", "yaml"},
    # The one exception to the rule that vca does not import models: from_pretrained returns a complete model.
    "hub": {"torch", "huggingface_hub", "models"},
}
ORDER = [f"vca.{name}" for name in THIRD_PARTY]
ALLOWED = {
    f"vca/{name}": packages | {f"vca.{name}"} | (set() if number < 3 else set(ORDER[:number]))
    for number, (name, packages) in enumerate(THIRD_PARTY.items())
}
ALLOWED["models"] = {"torch", "timm", "yaml", "vca.attention", "models"}
LAZY = {
    "bokeh",
    "jinja2",
    "pyarrow",
    "submitit",
    "torchdiffeq",
    "wandb",
    "torch.utils.tensorboard",
    "tqdm",
    "matplotlib",
    "sklearn",
    "torchvision.datasets",
    "diffusers",
    "torch_fidelity",
    "huggingface_hub",
}


def imports(path, top_level_only=False):
    """Yield the full names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if is_module(name) else node.module for name in inside)


def is_module(name):
    """Whether a name is a module of this repository, not a member of one."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_only_allowed_packages(package):
    files = sorted((ROOT / package).rglob("*.py")) or [ROOT / f"{package}.py"]
    for path in files:
        for name in imports(path):
            if name.split(".")[0] in STANDARD:
                continue
            allowed = any(name == a or name.startswith(f"{a}.") for a in ALLOWED[package])
            assert allowed, f"{path}: {name}"


def test_imports_no_cycle():
    """Modules of vca and models have no import cycle, including imports inside functions."""
    paths = [path for folder in ("vca", "models") for path in (ROOT / folder).rglob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    graph = {name: set(imports(path)) & set(names) for name, path in names.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_imports_no_root_script():
    roots = {path.stem for path in ROOT.glob("*.py")}
    for folder in ("vca", "models"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not roots & {name.split(".")[0] for name in imports(path)}, path


def test_imports_heavy_packages_lazily():
    for folder in ("vca", "models"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not LAZY & set(imports(path, top_level_only=True)), path


@pytest.mark.process
def test_imports_vca_needs_only_torch():
    """`import vca` works without the other requirements."""
    code = """
import sys
others = 'timm torchvision hydra omegaconf numpy PIL models wandb huggingface_hub jinja2'.split()
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in others:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse())
import torch
from vca import VisualContrastAttention, from_pretrained, replace_attention
try:
    from_pretrained("owner/name")
except ValueError as error:
    print(error)
print(VisualContrastAttention(8, 2, (2, 2), contrast_grid=(1, 1))(torch.randn(1, 4, 8)).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 4, 8])" in done.stdout
    message = "from_pretrained needs the package huggingface_hub: pip install 'visual-contrast-attention[research]'"
    assert message in done.stdout


IMPORT_ALL = """
import importlib, os, sys, warnings
import hydra, matplotlib, numpy, PIL.Image, safetensors.torch, scipy.linalg, submitit, timm.data
import torch, torchvision, yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

class Recording(type(os.environ)):
    def __getitem__(self, key):
        frame = sys._getframe(1)
        while frame.f_code.co_filename == "<frozen os>" or "_collections_abc" in frame.f_code.co_filename:
            frame = frame.f_back
        own = frame.f_code.co_filename.startswith(sys.argv[1])
        assert not own or key == "TRITON_INTERPRET", f"{frame.f_code.co_filename} reads {key}"  # as Triton's own import
        return super().__getitem__(key)

def refuse(*_, **__):
    raise AssertionError("parses YAML")

def state():
    flags = (torch.get_float32_matmul_precision(), list(warnings.filters))
    store = {group: list(node) for group, node in ConfigStore.instance().repo.items() if isinstance(node, dict)}
    registered = (store, set(ConfigStore.instance().repo), OmegaConf.has_resolver("divide"), timm.list_models())
    return (*flags, *registered, dict(os.environ), torch.get_rng_state().sum())

before = state()
os.environ.__class__ = Recording
yaml.load = yaml.safe_load = OmegaConf.load = refuse
for name in sys.argv[2:]:
    importlib.import_module(name)
assert before == state()
"""


@pytest.mark.process
def test_imports_without_side_effects():
    """Importing all modules sets no flags, registers nothing, parses no YAML and does not read the environment."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "vca").rglob("*.py"), *(ROOT / "models").rglob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    done = run_command(sys.executable, "-c", IMPORT_ALL, str(ROOT), *sorted(names))
    assert done.returncode == 0, done.stderr


HELP = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    runpy.run_path(script, run_name="__main__")
print("imported:", *sys.modules)
"""


@pytest.mark.process
def test_root_script_help_imports_no_timm():
    """`--help` of all root scripts together does not import slow packages besides torch."""
    scripts = sorted(path.name for path in ROOT.glob("*.py"))
    done = run_command(sys.executable, "-c", HELP, *scripts)
    assert done.returncode == 0, done.stderr[-3000:]
    said, _, names = done.stdout.rpartition("imported:")
    assert len(scripts) == 4
    assert all(f"python {script}" in said for script in scripts)
    imported = set(names.split())
    assert "torch" in imported
    assert not imported & {"timm", "torchvision", "torch._dynamo", "wandb", "matplotlib", "sklearn", "diffusers"}


def test_environment_files_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment_yml = yaml.safe_load((ROOT / "environment.yml").read_text())
    listed = environment_yml["dependencies"][-1]["pip"]
    assert sorted(listed) == sorted(project["dependencies"] + project["optional-dependencies"]["research"])
    python = next(d for d in environment_yml["dependencies"] if isinstance(d, str) and d.startswith("python="))
    assert project["requires-python"] == f">={python.removeprefix('python=')}"


def test_constraints_pin_every_requirement():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    pinned = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text()))
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    for requirement in wanted:
        name = re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")
        assert name in pinned, f"{name} has no tested version in constraints.txt"


def test_repository_no_machine_paths():
    """No file contains a path of a developer's machine."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    for name in files:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".yml", ".toml", ".txt") and path.exists():
            assert not re.search(r"/(home|root|work)/\w", path.read_text()), name
