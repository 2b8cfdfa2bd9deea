"""What a run costs: MFU, device-hours over a resume, and the trace of the profiler."""

import gzip
import json

import pytest

import train_cls
import vca.training.cost
from tests.support import TINY, metrics
from vca.config import compose
from vca.evaluation.complexity import count_macs
from vca.runtime.compute import Precision
from vca.runtime.devices import peak_flops

SHORT = (*TINY, "trainer.steps=12", "trainer.log_every=4", "trainer.checkpoint_every=4")


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100 80GB PCIe", "tf32", 156e12),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "fp32", 67e12),
        ("Tesla V100-SXM2-32GB", "fp16", 125e12),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("cpu", "fp32", None),
    ],
)
def test_peak_flops_of_whole_device_names(name, precision, peak):
    assert peak_flops(name, Precision(precision)) == peak


def test_mfu_is_share_of_peak(tmp_path, monkeypatch, capsys):
    """6 FLOPs per MAC and image, over the peak of a device; unknown on a CPU."""
    for device, peak in (("NVIDIA A100-SXM4-80GB", 19.5e12), ("cpu", None)):
        monkeypatch.setattr(vca.training.cost, "device_name", lambda _, device=device: device)
        config = compose("train_cls", [*SHORT, f"out_dir={tmp_path}", f"name={device}"])
        train_cls.run(config)
        macs = count_macs(train_cls.build_model, config.model, config.attention)
        records = [record for record in metrics(tmp_path / device) if "loss" in record]
        assert len(records) == 3
        for record in records:
            assert record["flops_per_second"] == pytest.approx(6 * macs * record["images_per_second"])
            assert record["mfu"] == (pytest.approx(record["flops_per_second"] / peak) if peak else None)
            assert record["peak_memory"] > 2**26
        printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 4/12")]
        assert ("mfu" in printed[0]) == (peak is not None)
        assert not any(key in printed[0] for key in ("device_hours", "peak_memory", "flops"))


def test_device_hours_add_up_over_a_resume(tmp_path):
    """Those of steps that were lost count; the estimate of the whole run ends at what it took."""
    folder, options = tmp_path / "run", [*SHORT, f"out_dir={tmp_path}", "name=run"]
    train_cls.run(compose("train_cls", options))
    whole = metrics(folder)
    hours = [record["device_hours"] for record in whole]
    assert hours == sorted(hours)
    assert hours[0] > 0
    for record in (record for record in whole if "loss" in record):
        assert record["device_hours_total"] >= record["device_hours"] * 0.999
    assert whole[-2]["device_hours_total"] == pytest.approx(hours[-2], rel=0.01)

    (folder / "checkpoints" / "step_00000012.pt").unlink()
    train_cls.run(compose("train_cls", options))
    launches = [json.loads(line) for line in (folder / "launches.jsonl").read_text().splitlines()]
    assert [launch["device_hours"] for launch in launches] == [0, hours[-1]]
    resumed = metrics(folder)
    assert [record["step"] for record in resumed] == [record["step"] for record in whole]
    assert resumed[1] == whole[1]  # of step 8, at which it resumed
    assert hours[-1] < resumed[2]["device_hours"] < 2 * hours[-1] + 0.01

    # A start that dies before its first record: the launch has the device-hours of the earlier ones.
    (folder / "metrics.jsonl").write_text(json.dumps(whole[0]) + "\n")
    train_cls.run(compose("train_cls", [*options, "trainer.steps=12"]))
    assert json.loads((folder / "launches.jsonl").read_text().splitlines()[-1])["device_hours"] >= hours[-1]


@pytest.mark.parametrize(("first", "steps"), [(5, ["step 5", "step 6", "step 7"]), (11, ["step 11"])])
def test_profile_writes_trace_of_three_steps(tmp_path, capsys, first, steps):
    """Also of fewer steps at the end of the run; the path is in the log."""
    train_cls.run(compose("train_cls", [*SHORT, f"out_dir={tmp_path}", "name=run", f"trainer.profile={first}"]))
    file = tmp_path / "run" / f"profile_step_{first:08d}.json.gz"
    assert f"profile: {file}" in capsys.readouterr().out
    with gzip.open(file, "rt") as trace:
        names = [event.get("name") for event in json.load(trace)["traceEvents"]]
    assert sorted({name for name in names if str(name).startswith("step ")}) == steps
    assert {"aten::addmm", "aten::native_layer_norm_backward", "aten::_fused_adamw_"} <= set(names)
    assert len(list((tmp_path / "run").glob("profile_*"))) == 1


def test_profile_does_not_change_a_run(tmp_path):
    for name, options in (("plain", []), ("profiled", ["trainer.profile=2"])):
        train_cls.run(compose("train_cls", [*SHORT, f"out_dir={tmp_path}", f"name={name}", *options]))
    plain, profiled = ([r.get("loss") for r in metrics(tmp_path / name)] for name in ("plain", "profiled"))
    assert plain == profiled


def test_profile_after_the_run_warns(tmp_path, capsys):
    train_cls.run(compose("train_cls", [*SHORT, f"out_dir={tmp_path}", "name=run", "trainer.profile=12"]))
    assert "warning: trainer.profile=12, but the run has 12 steps: no step is profiled" in capsys.readouterr().out
