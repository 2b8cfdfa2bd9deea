"""Where the jobs of a sweep run: this machine or SLURM."""

from dataclasses import dataclass, field

from vca.runtime.errors import ConfigError, check

# sbatch option -> the config key that sets it.
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
    """Resources of the jobs of a sweep, `cluster=local` or `cluster=slurm`.

    Attributes:
        name: `local` or `slurm`.
        nodes: nodes per job.
        ranks_per_node: processes per node; with GPUs, one per GPU.
        gpus_per_node: GPUs requested from SLURM; null requests none.
        cpus_per_rank: CPU cores per process and its loader workers.
        memory_gb: memory per node; null uses SLURM's default.
        partition, account, qos, constraint: sbatch option of the same name; null omits it.
        time_minutes: time limit of a job.
        requeue: requeue a job that was preempted or reached its time limit.
        max_requeues: maximum number of requeues at the time limit. Preemptions do not count, except in the last fifth
            or the last ten minutes of a job's time, where submitit takes any signal for the time limit.
        signal_seconds: how long before the time limit a job is signalled, and how long it may take to save a
            checkpoint, also when preempted; must be below the partition's grace time (SLURM's GraceTime or KillWait).
        max_restarts: how often torchrun restarts the ranks after one of them fails.
        max_parallel_jobs: maximum number of jobs of a sweep that run at the same time.
        sbatch: additional sbatch options, such as `['exclude=node7', 'mail-type=FAIL']`.
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
        check(self.signal_seconds >= 20, "cluster.signal_seconds", ">= 20, to save a checkpoint", self.signal_seconds)
        rule = f"at most half of cluster.time_minutes={self.time_minutes}"
        check(2 * self.signal_seconds <= 60 * self.time_minutes, "cluster.signal_seconds", rule, self.signal_seconds)
        for line in self.sbatch:
            option = line.lstrip("-").partition("=")[0]
            if option in OWN_KEYS:
                raise ConfigError(f"cluster.sbatch must not set {option}, got '{line}'; set cluster.{OWN_KEYS[option]}")
        check(self.nodes == 1 or self.name == "slurm", "cluster.nodes", "1 for cluster=local", self.nodes)
