"""One job of a sweep on one node: torchrun, which starts the ranks, and what happens when the scheduler ends it.

The scheduler's signal reaches every process of the job. The ranks save and end (`vca.runtime.signals`), torchrun ends
when they have, and only then does submitit put the job back into the queue.
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
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from vca.runtime.files import write_text
from vca.runtime.signals import EXIT_PREEMPTED, STOP_SIGNALS
from vca.sweep.plan import read_jobs

# Ranks that are started again must not meet at the addresses of the dead: pytorch issue 135712.
FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
ATTEMPT = "### started "  # begins the first line of each attempt in a log
REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


def torchrun(script: Path, arguments: Sequence[str], nodes: int, ranks_per_node: int, max_restarts: int) -> list[str]:
    """The command that starts this node's ranks; with several nodes they meet at the one that runs the batch script."""
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


def run_and_survive(command: Sequence[str], log: Path, save_seconds: int, scheduled: bool) -> int:
    """Run a command whose output goes to the end of a file; its exit code.

    A signal to stop is passed on, as SIGTERM, which torchrun gives to its ranks; after `save_seconds` it kills them (a
    torch too old for that: after 30). Then SIGUSR1 and SIGUSR2 go on to submitit's handler of before, which requeues
    the job and ends this process.

    Args:
        command: what `torchrun` gave.
        log: of this node.
        save_seconds: how long the ranks may take to save and end.
        scheduled: whether there is a scheduler, which ends the job after a signal that it gave.

    Raises:
        SystemExit: after a signal.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    environment = {**os.environ, **FRESH_STORE, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(save_seconds)}
    with open(log, "a") as output:
        print(f"{ATTEMPT}{time.strftime('%Y-%m-%d %H:%M:%S')} on {platform.node()}", file=output, flush=True)
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=ignore_requeue_signals,
            start_new_session=not scheduled,  # Ctrl-C comes to this process alone
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
    print(f"stopped by {name}; what the ranks said is in {log}", flush=True)
    if set(received) & set(REQUEUE_SIGNALS) and callable(requeue := before[signal.SIGUSR2]):
        requeue(signal.SIGUSR2, None)  # on the first node it ends this process
    if scheduled:
        time.sleep(save_seconds)  # after SIGTERM it requeues the job or cancels it, and ends this process either way
    sys.exit(EXIT_PREEMPTED)


def ignore_requeue_signals() -> None:
    """For torchrun, which would die of them; the ranks, its children, set handlers of their own."""
    for number in REQUEUE_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def run_job(config: DictConfig, program: Sequence[str]) -> None:
    """What Hydra's launcher calls, on the node where the job runs: all ranks of this node, to their end."""
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
    code = run_and_survive(command, log, cluster.signal_seconds, scheduled=cluster.name == "slurm")
    if node == 0:
        end = {
            "exit_code": code,
            "seconds": round(time.time() - started, 1),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID") if cluster.name == "slurm" else None,
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        }
        write_text(folder / "ends" / f"{number}.json", json.dumps(end) + "\n")
    if cluster.name == "slurm" and code != 0:
        sys.exit(code)  # so that SLURM counts it as failed too
