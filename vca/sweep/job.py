"""One job of a sweep on one node: torchrun and the handling of the scheduler's signals.

The scheduler signals every process of the job. The ranks save a checkpoint and exit (`vca.runtime.signals`), then
torchrun exits, and then submitit requeues the job.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from vca.runtime.files import write_text
from vca.runtime.signals import EXIT_PREEMPTED, STOP_SIGNALS
from vca.sweep.plan import read_jobs

# Restarted ranks must not use the store of the failed ones: https://github.com/pytorch/pytorch/issues/135712
FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
ATTEMPT = "### started "  # prefix of the first line of each attempt in a log
REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


def torchrun(script: Path, arguments: Sequence[str], nodes: int, ranks_per_node: int, max_restarts: int) -> list[str]:
    """Return the torchrun command of this node; the rendezvous is on the node that runs the batch script."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc_per_node={ranks_per_node}"]
    command.append(f"--max_restarts={max_restarts}")
    if nodes == 1:
        command.append("--standalone")
    else:
        job, first = os.environ["SLURM_JOB_ID"], os.environ["SLURM_NODEID"] == "0"
        attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
        endpoint = f"{os.environ['SLURM_LAUNCH_NODE_IPADDR']}:{20000 + int(job) % 10000}"
        command += ["--rdzv_backend=c10d", f"--rdzv_id={job}.{attempt}", f"--rdzv_endpoint={endpoint}"]
        command.append(f"--rdzv_conf=is_host={int(first)}")
    return [*command, str(script), *arguments]


def run_torchrun(command: Sequence[str], log: Path, save_seconds: int, scheduled: bool) -> int:
    """Run a torchrun command, append its output to a file, and return its exit code.

    A stop signal is passed on as SIGTERM, which torchrun sends to its ranks; it kills them after `save_seconds` (older
    torch: after 30 s). SIGUSR1 and SIGUSR2 are then passed to submitit's handler, which requeues the job and exits.
    `scheduled` is whether a scheduler ends the job after its signal.

    Raises:
        SystemExit: after a signal.
    """
    received: list[int] = []
    before = {number: signal.signal(number, lambda one, frame: received.append(one)) for number in STOP_SIGNALS}
    environment = {**os.environ, **FRESH_STORE, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(save_seconds)}
    with open(log, "a") as output:
        print(f"{ATTEMPT}{time.strftime('%Y-%m-%d %H:%M:%S')} on {platform.node()}", file=output, flush=True)
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=ignore_requeue_signals,
            start_new_session=not scheduled,  # Ctrl-C reaches only this process
        )
        while process.poll() is None and not received:
            time.sleep(0.2)
        if received and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if not received:
        return process.returncode
    name = signal.Signals(received[0]).name
    print(f"stopped by {name}; log: {log}", flush=True)
    if set(received) & set(REQUEUE_SIGNALS) and callable(requeue := before[signal.SIGUSR2]):
        requeue(signal.SIGUSR2, None)  # on the first node it ends this process
    if scheduled:
        time.sleep(save_seconds)  # after SIGTERM the scheduler requeues or cancels the job, and ends this process
    sys.exit(EXIT_PREEMPTED)


def ignore_requeue_signals() -> None:
    """Ignore SIGUSR1 and SIGUSR2 in torchrun, which they would kill; the ranks set their own handlers."""
    for number in REQUEUE_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def run_job(config: DictConfig, program: Sequence[str]) -> None:
    """Run all ranks of this node to completion; Hydra's launcher calls this on the node of the job."""
    settings = HydraConfig.get()
    folder, number = Path(settings.sweep.dir).absolute(), settings.job.num
    cluster: Any = OmegaConf.to_object(config.cluster)
    node = int(os.environ.get("SLURM_NODEID", 0)) if cluster.name == "slurm" else 0
    log = folder / "logs" / (f"{config.name}.log" if node == 0 else f"{config.name}.node{node}.log")
    if cluster.name == "local":
        print(f"[{number + 1}/{len(read_jobs(folder))}] {config.name}", flush=True)
    command = torchrun(
        folder / "code" / program[0],
        [*program[1:], *settings.overrides.task],
        cluster.nodes,
        cluster.ranks_per_node,
        cluster.max_restarts,
    )
    started = time.time()
    code = run_torchrun(command, log, cluster.signal_seconds, scheduled=cluster.name == "slurm")
    if node == 0:
        end = {
            "exit_code": code,
            "seconds": round(time.time() - started, 1),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID") if cluster.name == "slurm" else None,
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        }
        write_text(folder / "ends" / f"{number}.json", json.dumps(end) + "\n")
    if cluster.name == "slurm" and code != 0:
        sys.exit(code)  # so that SLURM reports a failed job
