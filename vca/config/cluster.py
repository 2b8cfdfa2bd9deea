"""Where the jobs of a sweep run: this machine or SLURM."""

from dataclasses import dataclass, field

from vca.runtime.errors import check

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
    "time": "time_minutes",
    "requeue": "requeue",
    "no-requeue": "requeue",
    "signal": "signal_seconds",
    "array": "max_parallel_jobs",
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
        time_minutes: time limit of a job.
        requeue: put a job that was preempted, or ran out of its time, back into the queue.
        max_requeues: how often a job that ran out of its time is requeued; preemption does not count, but in the last
            fifth, or the last ten minutes, of a job's time, where submitit takes any signal for the end of it.
        signal_seconds: how long before the end of its time a job is told to save, and how long it may take, also
            when it is preempted; keep it below the partition's grace time (SLURM's GraceTime or KillWait).
        max_restarts: how often torchrun starts the ranks again when one of them fails.
        max_parallel_jobs: how many jobs of a sweep run at once.
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
    time_minutes: int = 1440
    requeue: bool = True
    max_requeues: int = 100
    signal_seconds: int = 120
    max_restarts: int = 0
    max_parallel_jobs: int = 256
    sbatch: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check(self.name in ("local", "slurm"), "cluster", "local or slurm", self.name)
        for key in ("nodes", "ranks_per_node", "cpus_per_rank", "time_minutes", "max_parallel_jobs"):
            check(getattr(self, key) >= 1, f"cluster.{key}", ">= 1", getattr(self, key))
        for key in ("max_requeues", "max_restarts"):
            check(getattr(self, key) >= 0, f"cluster.{key}", ">= 0", getattr(self, key))
        for key in ("gpus_per_node", "memory_gb"):
            value = getattr(self, key)
            check(value is None or value >= 1, f"cluster.{key}", ">= 1 or null", value)
        check(self.signal_seconds >= 20, "cluster.signal_seconds", ">= 20, in which a job saves", self.signal_seconds)
        rule = f"at most half of cluster.time_minutes={self.time_minutes}"
        check(2 * self.signal_seconds <= 60 * self.time_minutes, "cluster.signal_seconds", rule, self.signal_seconds)
        for line in self.sbatch:
            option = line.lstrip("-").partition("=")[0]
            instead = f"used for what no key of its own sets; cluster.{OWN_KEYS.get(option)} sets {option}"
            check(option not in OWN_KEYS, "cluster.sbatch", instead, line)
        check(self.nodes == 1 or self.name == "slurm", "cluster.nodes", "1 for cluster=local", self.nodes)
