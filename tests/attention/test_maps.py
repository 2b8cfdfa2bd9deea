"""Attention maps agree with the layers; the script rejects invalid arguments in one line."""

import sys

import pytest
import torch
from PIL import Image

import scripts.attention_maps
import train_cls
from tests.support import TINY
from vca import VCAConfig, VisualContrastAttention
from vca.attention import ATTENTIONS, build_attention
from vca.attention.maps import maps_of, recorded_calls
from vca.attention.reference import rms_norm
from vca.config import compose

GRID, POOL = (4, 6), (2, 3)
OPTIONS = [
    {},
    {"stage2_softmax": "joint"},
    {"stage1": "plain"},
    {"stage2": "plain"},
    {"positive_stream": "pool", "negative_stream": "embedding"},
    {"pooling": "maximum"},
    {"lambda_form": "token"},
    {"norm": False},
    {"lambda_form": "token", "norm": False, "stage2_softmax": "joint"},
]


pytestmark = pytest.mark.process


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def call_of(module, batch=2):
    """Arguments and result of `attend` for random tokens."""
    tokens = module.num_prefix_tokens + GRID[0] * GRID[1]
    with recorded_calls(module) as calls:
        module(torch.randn(batch, tokens, module.dim, dtype=torch.float64))
    ((same, heads),) = calls
    assert same is module
    assert "attend" not in vars(module)  # the wrapper is removed
    with torch.no_grad():
        return heads, module.attend(heads)


def vca_module(num_heads=1, num_prefix_tokens=0, **options):
    torch.manual_seed(0)
    config = VCAConfig(local_branch=False, **options)
    return VisualContrastAttention(8 * num_heads, num_heads, GRID, POOL, num_prefix_tokens, 2, config=config).double()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_maps_reproduce_attention_output(options):
    """One head, no prefix token: the map of every patch, applied to v and normalised as Stage II does, is `attend`."""
    module = vca_module(**options)
    if module.config.norm:
        torch.nn.init.uniform_(module.norm2_weight, 0.5, 1.5)
    heads, expected = call_of(module)
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            found = maps_of(module, heads, (row, column))["VCA"]
            out = found.flatten(1)[:, None] @ heads.v[:, 0]  # (B, 1, D)
            if module.config.norm:
                out = rms_norm(out, (1 - module.lambda_init) * module.norm2_weight, 1e-5)
            close(out[:, 0], expected[:, 0, row * GRID[1] + column])


def test_attention_maps_average_heads():
    """Also with a prefix token, to which a map leaves a part of the weight."""
    module = vca_module(num_heads=2, num_prefix_tokens=1)
    heads, _ = call_of(module)
    every = []
    for head in range(2):
        one = vca_module(num_prefix_tokens=1)
        one.lambda1, one.lambda2 = module.lambda1, module.lambda2
        one.e_pos, one.e_neg = (torch.nn.Parameter(e[head : head + 1]) for e in (module.e_pos, module.e_neg))
        every.append(maps_of(one, heads._replace(**{x: getattr(heads, x)[:, head : head + 1] for x in "qkv"}), (3, 4)))
    for title, found in maps_of(module, heads, (3, 4)).items():
        close(found, (every[0][title] + every[1][title]) / 2)


def test_attention_maps_stages_equal_formula():
    """Stage I from the contrast token of the patch's cell, Stage II from the patch, both spelled out."""
    module = vca_module()
    heads, _ = call_of(module)
    q, k = heads.q[:, 0], heads.k[:, 0]
    t = q.unflatten(1, (2, 2, 3, 2)).mean((2, 4)).flatten(1, 2)  # (B, n, D): cells of 2 x 2 patches
    for row, column in [(0, 0), (1, 2), (2, 1), (3, 5)]:
        maps = maps_of(module, heads, (row, column))
        assert list(maps) == ["I+", "I-", "I", "II+", "II-", "II", "VCA"]
        cell = row // 2 * 3 + column // 2
        for sign, e in (("+", module.e_pos[0]), ("-", module.e_neg[0])):
            looks = torch.softmax((t + e)[:, cell, None] @ k.transpose(1, 2) / 8**0.5, -1)
            reads = torch.softmax(q[:, row * 6 + column, None] @ (t + e).transpose(1, 2) / 8**0.5, -1)
            close(maps[f"I{sign}"], looks.unflatten(-1, GRID)[:, 0])
            close(maps[f"II{sign}"], reads.unflatten(-1, POOL)[:, 0])
        close(maps["I"], maps["I+"] - module.lambda1() * maps["I-"])
        close(maps["II"], maps["II+"] - module.lambda2() * maps["II-"])


def test_attention_maps_plain_stage_has_one_stream():
    titles = {
        "stage1": ["I+", "II+", "II-", "II", "VCA"],
        "stage2": ["I+", "I-", "I", "II+", "VCA"],
    }
    for stage, expected in titles.items():
        module = vca_module(**{stage: "plain"})
        assert list(maps_of(module, call_of(module)[0], (0, 0))) == expected


def test_attention_maps_mhsa_reproduces_output():
    """Applied to v it is the attention."""
    torch.manual_seed(0)
    module = build_attention(ATTENTIONS["softmax"][0](), 8, 1, GRID).double()
    heads, expected = call_of(module)
    found = maps_of(module, heads, (2, 3))
    assert list(found) == ["MHSA"]
    close((found["MHSA"].flatten(1)[:, None] @ heads.v[:, 0])[:, 0], expected[:, 0, 2 * 6 + 3])
    with pytest.raises(ValueError, match=r"patch must be on the grid 4 x 6, got \(4, 0\)"):
        maps_of(module, heads, (4, 0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("agent", {}),
        ("differential_v2", {}),
        ("focused_linear", {}),
        ("inline", {"predicted_kernels": False}),
        ("linear", {}),
        ("linear", {"feature_map": "softmax"}),
        ("mala", {}),
        ("mhla", {}),
    ],
)
def test_attention_maps_of_linear_combinations_reproduce_output(name, options):
    """The derivative by v, applied to v, is the attention, where all channels have the same weights."""
    torch.manual_seed(0)
    module = build_attention(ATTENTIONS[name][0](**options), 8, 1, GRID, POOL).double()
    tokens, expected = call_of(module)
    found = maps_of(module, tokens, (2, 3))
    assert list(found) == ["do/dv"]
    close((found["do/dv"].flatten(1)[:, None] @ tokens.v[:, 0])[:, 0], expected[:, 0, 2 * 6 + 3])


@pytest.mark.parametrize("name", ["attend", "stage1", "stage2"])
def test_attention_maps_overridden_stage_has_derivative(name):
    own = getattr(VisualContrastAttention, name)
    variant = type("Variant", (VisualContrastAttention,), {name: lambda *args: own(*args)})
    module = variant(8, 1, GRID, POOL).double()
    tokens, expected = call_of(module)
    found = maps_of(module, tokens, (0, 0))["do/dv"].flatten(1)  # (B, N)
    v = tokens.v + 1e-6  # all channels of all tokens
    with torch.no_grad():
        moved = (module.attend(tokens._replace(v=v)) - expected)[:, 0, 0].sum(-1) / 1e-6
    torch.testing.assert_close(8 * found.sum(1), moved, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="session")
def baselines(artefact):
    """Runs like `classifier_run`: of MHSA, of MHSA on another grid, of Agent Attention, of other data."""
    return artefact("baselines", train_baselines)


def train_baselines(out):
    for name, more in {
        "softmax": ["attention=softmax"],
        "coarse": ["attention=softmax", "model.patch_size=4", "model.contrast_grid=[1,1]"],
        "agent": ["attention=agent"],
        "other": ["attention=softmax", "data.mean=[0.5]"],
    }.items():
        overrides = [*TINY, f"out_dir={out}", f"name={name}", "trainer.steps=1", *more]
        train_cls.run(compose("train_cls", overrides))


def run_maps(monkeypatch, *arguments):
    """Run the script."""
    monkeypatch.setattr(sys, "argv", ["attention_maps.py", *map(str, arguments)])
    scripts.attention_maps.main()


def test_attention_maps_script_writes_pictures(classifier_run, baselines, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(
        scripts.attention_maps,
        "plot_layer",
        lambda *given, real=scripts.attention_maps.plot_layer: (drawn.append(list(given[2])), real(*given)),
    )
    photo = tmp_path / "photo.png"
    Image.effect_noise((20, 12), 50).save(photo)
    run_maps(
        monkeypatch, classifier_run, "--baseline", baselines / "softmax", "--images", 0, photo, "--out", tmp_path / "a"
    )
    both = ["I+", "I-", "I", "II+", "II-", "II", "VCA", "MHSA"]
    assert drawn == [both, both]
    for layer in range(2):
        with Image.open(tmp_path / "a" / f"layer_0{layer}.png") as picture:
            assert min(picture.size) > 200
            assert len(set(picture.convert("L").tobytes())) > 100
    run_maps(monkeypatch, baselines / "softmax", "--patch", 3, 0, "--out", tmp_path / "b")
    assert drawn[2:] == [["MHSA"], ["MHSA"]]
    assert len(list((tmp_path / "b").iterdir())) == 2
    run_maps(monkeypatch, baselines / "agent", "--out", tmp_path / "c")
    assert drawn[4:] == [["do/dv"], ["do/dv"]]
    assert capsys.readouterr().out.startswith("2 figures written to ")


def test_attention_maps_script_wrong_arguments_refused(
    classifier_run, baselines, generator_run, tmp_path, monkeypatch, capsys
):
    """One line each, and no figure."""
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "colour.png")
    run, out = classifier_run, ("--out", tmp_path / "out")
    for arguments, message in [
        ((tmp_path,), "must be a run directory with a config.json"),
        ((generator_run,), "must be a classifier run (train_cls.py), got a generator"),
        ((run, "--images", "359"), "index must be < 359 (evaluation images), got 359"),
        ((run, "--images", tmp_path / "none.png"), "--images: no such file: "),
        ((run, "--images", tmp_path / "text.png"), "text.png (cannot identify"),
        ((run, "--images", tmp_path / "colour.png"), "colour.png must be grey (data.in_chans=1), got RGB"),
        ((run, "--patch", "4", "0"), "patch must be on the grid 4 x 4, got (4, 0)"),
        ((run, "--baseline", run), "run must be a run with MHSA"),
        ((baselines / "softmax", "--baseline", baselines / "softmax"), "softmax must be a run with VCA"),
        ((run, "--baseline", baselines / "other"), "must have the data of"),
        ((run, "--baseline", baselines / "other"), "got data.mean: [0.5] -> [0.306]"),
        ((run, "--baseline", baselines / "coarse"), "must be [(4, 4), (4, 4)] as in "),
    ]:
        with pytest.raises(SystemExit) as stopped:
            run_maps(monkeypatch, *arguments, *out)
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert message in error
        assert error.startswith("config error: ")
        assert error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()
