"""One job of a sweep on one node: torchrun, which starts the ranks, and what happens when the scheduler ends it.

The scheduler's signal reaches every process of the job. The ranks save and end (`vca.runtime.signals`), torchrun ends
when they have, and only then does submitit put the job back into the queue.
"""

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from vca.runtime.errors import check
from vca.runtime.signals import EXIT_PREEMPTED, STOP_SIGNALS

# Ranks that are started again must not meet at the addresses of the dead: pytorch issue 135712.
FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
ATTEMPT = "### started "  # begins the first line of each attempt in a log
REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)

# Options of sbatch that a key of the config sets.
OWN_KEYS = {
    "nodes": "nodes",
    "ntasks-per-node": "ranks_per_node",
    "gpus-per-node": "gpus_per_node",
    "gres": "gpus_per_node",
    "cpus-per-task": "cpus_per_rank",
    "mem": "memory_gb",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "time": "minutes",
    "requeue": "requeue",
    "no-requeue": "requeue",
    "signal": "signal_seconds",
    "array": "parallel",
}


@dataclass
class ClusterConfig:
    """Where the jobs of a sweep run, `cluster=local` or `cluster=slurm`.

    Attributes:
        name: `local` or `slurm`.
        nodes: of one job.
        ranks_per_node: processes a node; with GPUs, one for each.
        gpus_per_node: what SLURM is asked for; null asks for none.
        cpus_per_rank: CPU cores for each process and its loader workers.
        memory_gb: of a node; null leaves it to SLURM.
        partition, account, qos, constraint: as for sbatch; null leaves them out.
        minutes: time limit of a job.
        requeue: put a job that was preempted, or ran out of its time, back into the queue.
        max_requeues: how often a job that ran out of its time is requeued; preemption does not count, but in the last
            fifth, or the last ten minutes, of a job's time, where submitit takes any signal for the end of it.
        signal_seconds: how long before the end of its time a job is told to save, and how long it may take, also
            when it is preempted; keep it below the partition's grace time (SLURM's GraceTime or KillWait).
        max_restarts: how often torchrun starts the ranks again when one of them fails.
        parallel: how many jobs of a sweep run at once.
        sbatch: further options of sbatch, such as `['exclude=node7', 'mail-type=FAIL']`.
        setup: shell commands before the job, such as `['module load cuda']`.
    """

    name: str = "local"
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int | None = None
    cpus_per_rank: int = 1
    memory_gb: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    minutes: int = 1440
    requeue: bool = True
    max_requeues: int = 100
    signal_seconds: int = 120
    max_restarts: int = 0
    parallel: int = 256
    sbatch: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check(self.name in ("local", "slurm"), "cluster", "local or slurm", self.name)
        for key in ("nodes", "ranks_per_node", "cpus_per_rank", "minutes", "parallel"):
            check(getattr(self, key) >= 1, f"cluster.{key}", ">= 1", getattr(self, key))
        for key in ("max_requeues", "max_restarts"):
            check(getattr(self, key) >= 0, f"cluster.{key}", ">= 0", getattr(self, key))
        for key in ("gpus_per_node", "memory_gb"):
            value = getattr(self, key)
            check(value is None or value >= 1, f"cluster.{key}", ">= 1 or null", value)
        check(self.signal_seconds >= 20, "cluster.signal_seconds", ">= 20, in which a job saves", self.signal_seconds)
        rule = f"at most half of cluster.minutes={self.minutes}"
        check(2 * self.signal_seconds <= 60 * self.minutes, "cluster.signal_seconds", rule, self.signal_seconds)
        for line in self.sbatch:
            option = line.lstrip("-").partition("=")[0]
            instead = f"used for what no key of its own sets; cluster.{OWN_KEYS.get(option)} sets {option}"
            check(option not in OWN_KEYS, "cluster.sbatch", instead, line)
        check(self.nodes == 1 or self.name == "slurm", "cluster.nodes", "1 for cluster=local", self.nodes)


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
