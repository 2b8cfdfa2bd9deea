"""Sweeps: invalid ones are refused before a job starts; results are tabulated, and failures are reported."""

import json
import os
import re
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

import train_cls
import train_gen
from tests.processes import ROOT, Launch, run_script
from tests.support import SMALL_DIT, TINY, last_step, metrics
from vca.attention import ATTENTIONS, variant_name
from vca.config import compose
from vca.config.composition import CONFIGS
from vca.report.sweep_table import sweep_table
from vca.runtime.errors import ConfigError
from vca.sweep import slurm
from vca.sweep.plan import ablations, plan, rows_of_ablation
from vca.sweep.slurm import wait_for_jobs
from vca.sweep.summary import failure_reason, report
from vca.training.checkpoint import list_checkpoints

ON_DIT = ("stages", "contrast_grid")  # one that selects attention files, one that sets a key
ATTENTION_FILES = sorted(path.stem for path in (CONFIGS / "attention").glob("*.yaml"))


MINE = "# @package _global_\ntrainer:\n  steps: 3\n  global_batch_size: 60\n"  # an experiment
MINE_ATTENTION = {
    "my_a": "defaults: [vca_schema]\ncontrast_grid: [2, 3]\n",
    "my_b": "defaults: [my_a]\ncontrast_grid: [3, 3]\n",
}
SHORT = [option for option in TINY if not option.startswith(("trainer.steps", "trainer.global_batch_size"))]
OWN = ("--config-dir", "conf", *SHORT, "experiment=mine", "wandb.entity=${oc.env:TOKEN}")
JOBS = [f"digits-deit_mini-vca-contrast_grid_{grid}-seed{seed}" for grid in ("2x3", "3x3") for seed in (0, 1)]
FAILS = 2  # number of the job that fails


class Sweep(NamedTuple):
    """What the fixture `sweep` has run."""

    work: Path  # the working directory, with the user's `conf`
    out: Path
    folder: Path  # of the sweep
    token: str  # value of the environment variable TOKEN
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def sweep(artefact):
    """A local sweep over two attention variants of the user's `--config-dir` and two seeds; one of the jobs fails."""

    def build(folder):
        work, out = folder / "work", folder / "out"
        for name, text in {"experiment/mine": MINE, **{f"attention/{k}": v for k, v in MINE_ATTENTION.items()}}.items():
            file = work / "conf" / f"{name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (out / JOBS[FAILS]).mkdir(parents=True)
        (out / JOBS[FAILS] / "config.json").write_text("{}")  # of another run
        token = token_hex()  # not written here, as a diff of this file is stored too
        options = [*OWN, "wandb.project=of-${wandb.entity}", "attention=glob(my_*)", "seed=0,1", f"out_dir={out}"]
        done = run_script("train_cls.py", "-m", *options, cwd=work, env={"TOKEN": token})
        said = {"token": token, "exit_code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
        (folder / "said.json").write_text(json.dumps(said))

    folder = artefact("sweep", build)
    (own,) = (folder / "out" / "sweeps").iterdir()
    return Sweep(folder / "work", folder / "out", own, **json.loads((folder / "said.json").read_text()))


@pytest.mark.process
def test_sweep_failing_job_named_others_tabulated(sweep):
    """The table has the other jobs, the failed one is reported with its reason, and the exit code is 1."""
    assert sweep.exit_code == 1, sweep.stderr[-3000:]
    record = json.loads((sweep.folder / "jobs.json").read_text())
    assert "-m" in record["command"]
    assert [job["number"] for job in record["jobs"]] == [0, 1, 2, 3]
    assert [job["name"] for job in record["jobs"]] == JOBS
    code = sweep.folder / "code"
    assert (code / "train_cls.py").read_text() == (ROOT / "train_cls.py").read_text()
    launch = json.loads((sweep.out / JOBS[0] / "launches.jsonl").read_text())
    assert launch["commit"] == record["commit"] == ((code / "COMMIT").read_text().strip() or None)
    assert str(code) in launch["command"]

    table = [line for line in sweep.stdout.splitlines() if line.startswith("| vca")]
    assert len(table) == 2
    assert table[0].endswith(f"| 2 | {JOBS[0]} {JOBS[1]} |")
    assert " +- " in table[0]
    assert table[1].endswith(f"| 1 | {JOBS[3]} |")
    failed = [line for line in sweep.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1
    assert failed[0].startswith(f"failed: {JOBS[FAILS]}: exit code 1; config error: ")
    assert "another config" in (sweep.folder / "logs" / f"{JOBS[FAILS]}.log").read_text()
    ends = [json.loads((sweep.folder / "ends" / f"{number}.json").read_text())["exit_code"] for number in range(4)]
    assert ends == [0, 0, 1, 0]
    assert metrics(sweep.out / JOBS[3])[-1]["step"] == 3


@pytest.mark.process
def test_secret_from_environment_stored_as_reference(sweep):
    """No file of a sweep or its runs contains the value, and a run resumes with another value."""
    files = [path for path in sweep.out.rglob("*") if path.is_file()]
    assert len(files) > 100  # with the copy of the code
    assert [path for path in files if sweep.token.encode() in path.read_bytes()] == []
    config = json.loads((sweep.out / JOBS[1] / "config.json").read_text())
    assert (config["wandb"]["entity"], config["wandb"]["project"]) == ("${oc.env:TOKEN}", "of-${wandb.entity}")
    options = [*OWN, "wandb.project=of-${wandb.entity}", "attention=my_a", "seed=1", f"out_dir={sweep.out}"]
    again = run_script("train_cls.py", *options, cwd=sweep.work, env={"TOKEN": "another"})
    assert again.returncode == 0, again.stderr[-3000:]


@pytest.mark.process
def test_sweep_config_dir_and_glob(sweep):
    """Every job of a sweep uses the user's `--config-dir` as it was at the start; relative paths work."""
    for name in (JOBS[0], JOBS[3]):
        assert json.loads((sweep.out / name / "config.json").read_text())["trainer"]["steps"] == 3
        assert metrics(sweep.out / name)[-1]["step"] == 3
    assert (sweep.folder / "config_dir" / "experiment" / "mine.yaml").read_text() == MINE
    launch = json.loads((sweep.out / JOBS[0] / "launches.jsonl").read_text())
    assert f"--config-dir {sweep.folder}/config_dir" in launch["command"]
    jobs = json.loads((sweep.folder / "jobs.json").read_text())["jobs"]
    swept = [[one for one in job["overrides"] if one.startswith(("attention=", "seed="))] for job in jobs]
    assert swept == [[f"attention={name}", f"seed={seed}"] for name in ("my_a", "my_b") for seed in (0, 1)]


@pytest.mark.process
def test_environment_value_of_result_key_is_compared(tmp_path, monkeypatch):
    """A learning rate from the environment is stored as a number, and another one is refused on resume."""
    options = [*TINY, "trainer.steps=1", "optim.lr=${oc.env:LR}", "wandb.entity=${oc.env:LR}", f"out_dir={tmp_path}"]
    monkeypatch.setenv("LR", "0.01")
    config = compose("train_cls", [*options, "name=run"])
    assert (config.optim.lr, config.wandb.entity) == (0.01, "0.01")
    train_cls.run(config)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["optim"]["lr"] == 0.01
    monkeypatch.setenv("LR", "0.02")
    with pytest.raises(ConfigError, match=r"optim.lr: 0.01 -> 0.02\)"):
        train_cls.run(compose("train_cls", [*options, "name=run"]))


@pytest.mark.process
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["optim.lr=1e-3,5e-4"],
            r"jobs 0 and 1 have the same run directory .*; put the swept values into the name, such as name='lr",
        ),
        (["seed=0,-1"], r"config error: seed must be >= 0 and below 2\^63, got -1 \(job 1: .*seed=-1\)"),
        (["ablation=stagse"], r"ablation=stagse: no such option; did you mean 'stages'\?"),
        (["cluster=local", "cluster.nodes=2"], r"cluster.nodes must be 1 for cluster=local, got 2"),
        (["out_dir=/a,/b"], r"out_dir must not be swept"),
        (
            ["cluster=slurm", "cluster.time_minutes=3"],
            r"signal_seconds must be at most half of cluster.time_minutes=3, got 120",
        ),
        (
            ["cluster=slurm", "cluster.sbatch=['nodes=2']"],
            r"cluster.sbatch must not set nodes, got 'nodes=2'; set cluster.nodes",
        ),
        (["cluster=slurm", "cluster.gpus_per_node=-1"], r"cluster.gpus_per_node must be >= 1 or null, got -1"),
        (["model=glob(dit_*)"], r"model=glob\(\): no option matches \(options: .*, deit_tiny, pvt_"),  # not its own
        (["optim.lr=glob(*)"], r"optim.lr=glob\(\): no option matches"),
        (["--config-dir=/nowhere"], r"--config-dir must be a folder, got '/nowhere'"),
        (["hydra.run.dir=/x"], r"hydra.run.dir has no effect; set out_dir and name instead"),
        (["cluster=slurm", "cluster.setup=['export A=${oc.env:HOME}']"], r"use a shell variable: \$NAME"),
        (["cluster.nodse=2"], r"unknown key 'cluster.nodse'; did you mean 'cluster.nodes'\?"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_sweep_wrong_input_refused_before_start(tmp_path, overrides, line):
    done = run_script("train_cls.py", "-m", f"out_dir={tmp_path / 'out'}", *overrides)
    assert done.returncode == 2, done.stderr[-3000:]
    assert re.search(line, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "script"), [*((name, "train_cls") for name in ablations()), *((name, "train_gen") for name in ON_DIT)]
)
def test_ablation_jobs_are_distinct_runs(name, script):
    """`test_complexity_rows_build` also builds every row as a DiT."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose(script, [f"ablation={name}"], return_hydra_config=True)
        config.hydra.overrides.task = [f"ablation={name}"]
        jobs = plan(config, script)
    assert len(jobs) == 3 * len(rows_of_ablation(name))
    assert len({job["run"] for job in jobs}) == len(jobs)


def test_ablation_rows_match_tables_3_and_4():
    named = {name: [row[0] for row in rows_of_ablation(name)] for name in ablations()}
    assert named["stages"] == ["vca_stage1_only", "vca_stage2_only", "differential_stages", "vca"]
    assert named["streams"] == ["vca_embedding_streams", "vca"]
    assert {attention for rows in named.values() for attention in rows} <= set(ATTENTION_FILES)


@pytest.mark.process
@pytest.mark.parametrize("attention", ATTENTION_FILES)
def test_attention_every_config_trains_20_steps(tmp_path, attention):
    """As classifier and generator, every loss is finite, and the last losses are lower than the first."""
    short = ("trainer.steps=20", f"attention={attention}", f"out_dir={tmp_path}", "trainer.eval_every=0")
    short += ("trainer.log_every=1", "optim.lr=5e-3", "trainer.global_batch_size=120")
    plain = ("augment.mixup=0", "augment.cutmix=0", "optim.warmup_epochs=0")
    train_cls.run(compose("train_cls", [*TINY, *short, *plain, "name=cls"]))
    train_gen.run(compose("train_gen", [*SMALL_DIT, *short, "name=gen"]))
    for name in ("cls", "gen"):
        losses = [record["loss"] for record in metrics(tmp_path / name) if "loss" in record]
        assert len(losses) == 20
        assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.process
@pytest.mark.parametrize("contrast_grid", ["[1,1]", "[2,2]", "[4,4]", "[7,7]", "[8,8]"])
def test_attention_every_contrast_grid_trains_20_steps(tmp_path, contrast_grid):
    options = [*TINY, "trainer.steps=20", "trainer.global_batch_size=40", f"attention.contrast_grid={contrast_grid}"]
    options += [f"out_dir={tmp_path}"]
    train_cls.run(compose("train_cls", [*options, "name=cls"]))
    assert metrics(tmp_path / "cls")[-1]["step"] == 20
    assert [f"attention.contrast_grid={contrast_grid}"] in [row[1:] for row in rows_of_ablation("contrast_grid")]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"name": "vca"}, "vca"),
        ({"name": "vca", "stage2": "plain"}, "vca-stage2_plain"),
        ({"name": "vca", "contrast_grid": [4, 4], "local_branch": False}, "vca-contrast_grid_4x4-local_branch_false"),
        ({"name": "vca", "positive_stream": "pool+embedding"}, "vca"),
        ({"name": "softmax", "local_branch": True}, "softmax-local_branch_true"),
    ],
    ids=str,
)
def test_describe_names_attention_variants(options, name):
    assert variant_name(options) == name
    assert ATTENTIONS[options["name"]][0](**options) is not None


def finished_run(folder, attention="vca", seed=0, top1=50.0, step=4, **data):
    config = {
        "name": folder.name,
        "seed": seed,
        "attention": {"name": "vca", **({"stage2": "plain"} if attention == "plain" else {})},
        "trainer": {"steps": 4, "epochs": 1},
        "data": {"name": "digits", **data},
        "optim": {"lr": 0.001},
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    records = [{"step": step, "loss": 1.0}, {"step": step, "val/top1": top1, "val/loss": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_sweep_table_mean_over_seeds_and_excluded_runs(tmp_path):
    """Mean and std over seeds, one row per config, one table per data set, then the runs without results."""
    runs = [finished_run(tmp_path / f"a{seed}", seed=seed, top1=50 + seed) for seed in range(3)]
    runs += [finished_run(tmp_path / "b", attention="plain", top1=40.0)]
    short = finished_run(tmp_path / "short", seed=5, step=2)
    unevaluated = finished_run(tmp_path / "unevaluated", seed=6)
    records = [{"step": 2, "val/top1": 9.0}, {"step": 4, "loss": 1.0}]
    (unevaluated / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    twice = finished_run(tmp_path / "twice", seed=1, top1=90.0)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("[]")
    lines = sweep_table([*runs, runs[0], short, unevaluated, twice, foreign, tmp_path / "none"]).splitlines()
    assert lines[2:] == [
        "| vca | 51.00 +- 1.00 | 0.5000 +- 0.0000 | 1.0000 +- 0.0000 | 3 | a0 a1 a2 |",
        "| vca-stage2_plain | 40.00 | 0.5000 | 1.0000 | 1 | b |",
        f"{twice}: skipped, same config and seed as {runs[1]}",
        f"{short}: not finished (step 2)",
        f"{unevaluated}: not finished (step 4)",
        f"{foreign}: not a run of this project, or corrupt (ConfigError)",
        f"{tmp_path / 'none'}: not started",
    ]
    other = finished_run(tmp_path / "other", num_classes=7, top1=30.0)
    text = sweep_table([*runs, other])
    assert "data.num_classes=None\n\n| " in text
    assert text.endswith(
        "data.num_classes=7\n\n|  | top-1 (%) | evaluation loss | training loss | seeds | runs |\n"
        "| --- | --- | --- | --- | --- | --- |\n| vca | 30.00 | 0.5000 | 1.0000 | 1 | other |"
    )


def test_sweep_report_lists_failed_jobs(tmp_path, capsys):
    """Failures can be reported after the process that waited for the jobs was killed."""
    jobs = [
        {"number": 0, "name": "a", "run": str(finished_run(tmp_path / "a")), "overrides": []},
        {"number": 1, "name": "b", "run": str(tmp_path / "b"), "overrides": []},
        {"number": 2, "name": "c", "run": str(finished_run(tmp_path / "c", seed=1)), "already_finished": True},
    ]
    for name in ("ends", "logs"):
        (tmp_path / "sweep" / name).mkdir(parents=True)
    (tmp_path / "sweep" / "jobs.json").write_text(json.dumps({"jobs": jobs}))
    for number, name in ((0, "a"), (2, "c")):
        (tmp_path / "sweep" / "ends" / f"{number}.json").write_text('{"exit_code": 0, "seconds": 7.1}')
        (tmp_path / "sweep" / "logs" / f"{name}.log").write_text("### started now\nstep 4\ntop-1 50\n")
    (tmp_path / "sweep" / "logs" / "b.log").write_text("### started now\nconfig error: x\n")
    assert report(tmp_path / "sweep") == 1
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[:2] == [
        f"finished: a: top-1 50 (7 s; {tmp_path / 'sweep' / 'logs' / 'a.log'})",
        f"already finished: c: top-1 50 (7 s; {tmp_path / 'sweep' / 'logs' / 'c.log'})",
    ]
    assert lines[-2].startswith("| vca | 50.00 ")
    assert lines[-1] == f"with the runs of other sweeps: python scripts/table.py {tmp_path} --runs"
    assert said.err == f"failed: b: did not finish; config error: x ({tmp_path / 'sweep' / 'logs' / 'b.log'})\n"


TORCHRUN = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n  exitcode  : -9 (pid: 7)\n=====\n"


@pytest.mark.parametrize(
    ("log", "second", "line"),
    [
        (None, None, "no log"),
        ("", None, "empty log"),
        ("config error: data.root\nE1123 failed\nChildFailedError: x\n", None, "config error: data.root"),
        (f"Traceback\n  File\n[rank0]: ZeroDivisionError: by zero\n{TORCHRUN}", None, "[rank0]: Zero"),
        (f"step 4\n{TORCHRUN}", None, "a rank was killed by SIGKILL"),
        (f"stopped: SIGTERM; saved\n### started now\nstep 4\n{TORCHRUN}", None, "a rank was killed by SIGKILL"),
        ("torch.SignalException: Process 9 got signal: 15\nlast\n", None, "last"),
        ("waiting for node 1\n", "### started now\nOSError: no such disk\n", "OSError: no such disk"),
    ],
)
def test_failure_reason_reason_from_last_attempt(tmp_path, log, second, line):
    """The reason is from the last attempt, and from the first node that printed one."""
    if log is not None:
        (tmp_path / "run.log").write_text(f"### started now\n{log}")
    if second is not None:
        (tmp_path / "run.node1.log").write_text(second)
    file, said = failure_reason(tmp_path, "run")
    assert said.startswith(line)
    assert file.name == ("run.node1.log" if second else "run.log")


@contextmanager
def sweep_config(*options: str, script: str = "train_cls"):
    """Yield the config of a sweep, inside Hydra's context."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield GlobalHydra.instance().hydra.compose_config(script, list(options), RunMode.MULTIRUN)


def test_sweep_name_interpolates_swept_values(tmp_path):
    """The remedy in the error about equal run directories works."""
    options = ["optim.lr=1e-3,5e-4", "name='lr${optim.lr}-seed${seed}'", f"out_dir={tmp_path}"]
    with sweep_config(*options) as config:
        assert [job["name"] for job in plan(config, "train_cls")] == ["lr0.001-seed0", "lr0.0005-seed0"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("attention=glob(vca_stage*)", ["vca_stage1_only", "vca_stage2_only"]),
        ("attention=glob([a*,d*],exclude=*_stages)", ["agent", "differential", "differential_v2"]),
        ("attention=glob(softmax)", ["softmax"]),
        ("model=glob(deit_mini)", ["deit_mini"]),
    ],
)
def test_sweep_glob_takes_matching_options(override, expected):
    """A glob matches the options that `--help` lists, not schemas."""
    group = override.partition("=")[0]
    name = f"name='${{{group}.name}}-${{seed}}-${{variant:${{attention}}}}'"
    with sweep_config(override, "seed=0,1", name) as config:
        jobs = plan(config, "train_cls")
    assert [job["overrides"][:2] for job in jobs] == [
        [f"{group}={name}", f"seed={seed}"] for name in expected for seed in (0, 1)
    ]


@pytest.mark.parametrize("script", ["train_cls", "train_gen"])
def test_sweep_plan_marks_finished_runs(tmp_path, script):
    """A job is marked if its run has finished before; it only reads the result again."""
    name = compose(script).name
    finished_run(tmp_path / name)
    finished_run(tmp_path / name.replace("seed0", "seed1"), step=2)  # not finished
    with sweep_config("seed=0,1,2", f"out_dir={tmp_path}", script=script) as config:
        assert [job["already_finished"] for job in plan(config, script)] == [True, False, False]


@pytest.mark.parametrize("data", ["imagefolder", "imagenet"])
def test_sweep_class_count_checked_before_start(tmp_path, data):
    """The number of class folders must be `data.num_classes`; a folder that is absent on this machine is no error."""
    for name in ("cat", "dog"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
    options = (f"data={data}", "model=deit_tiny", f"out_dir={tmp_path}", "seed=0,1")
    wrong = pytest.raises(ConfigError, match=r"num_classes is 1000, but .*/train has 2 class folders; .*\(job 0: ")
    with sweep_config(*options, f"data.root={tmp_path}/images") as config, wrong:
        plan(config, "train_cls")
    with sweep_config(*options, f"data.root={tmp_path}/images", "data.num_classes=2") as config:
        assert len(plan(config, "train_cls")) == 2
    with sweep_config(*options, f"data.root={tmp_path}/absent") as config:
        assert len(plan(config, "train_cls")) == 2


@pytest.mark.process
def test_sweep_refused_by_sbatch_reported(tmp_path):
    """sbatch's own error is printed once, then a line for each job; there is no table and no traceback."""
    error = "sbatch: error: invalid partition specified: nowhere"
    for name, text in (("sbatch", f"echo '{error}' >&2; exit 1"), ("srun", ""), ("squeue", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    options = ["cluster=slurm", "cluster.partition=nowhere", "seed=0,1", f"out_dir={tmp_path / 'out'}"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run_script("train_cls.py", "-m", *options, env={"PATH": path})
    assert done.returncode == 1
    first, *failed = done.stderr.splitlines()
    assert first == error
    assert [line.split(";")[0] for line in failed] == [
        f"failed: digits-deit_mini-vca-seed{seed}: did not finish" for seed in (0, 1)
    ]
    assert done.stdout.startswith("2 job(s), 0 already finished, sweep folder ")
    assert done.stdout.splitlines()[1:] == ["no job finished"]


def test_wait_for_jobs_stops_when_slurm_job_cancelled(tmp_path, monkeypatch):
    """When SLURM no longer has the jobs, the launcher is stopped; it would wait forever."""
    (tmp_path / "slurm" / "7").mkdir(parents=True)
    (tmp_path / "slurm" / "7" / "7_0_submitted.pkl").touch()
    (tmp_path / "jobs.json").write_text('{"jobs": [{}]}')
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "POLL", 0.1)
    with subprocess.Popen(["sleep", "60"]) as launcher:
        wait_for_jobs(launcher, tmp_path)
        assert launcher.returncode == -signal.SIGTERM


@pytest.mark.process
def test_sweep_ctrl_c_saves_checkpoints(tmp_path):
    """Ctrl-C ends a local sweep after the current step with a checkpoint."""
    options = ["-m", *TINY, "trainer.steps=4000", "seed=0,1", f"out_dir={tmp_path}"]
    launch = Launch("train_cls.py", *options)
    run = tmp_path / "digits-deit_mini-vca-seed0"
    launch.wait_until(lambda: last_step(run) >= 3)
    os.killpg(launch.processes[0].pid, signal.SIGINT)
    assert launch.wait(60) == 1
    assert "Traceback" not in launch.stderr
    failed = [line.split(":")[1].strip() for line in launch.stderr.splitlines()]
    assert failed == [run.name, run.name.replace("0", "1")]
    assert list_checkpoints(run / "checkpoints")[-1].name == f"step_{last_step(run):08d}.pt"
