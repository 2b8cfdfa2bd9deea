"""Sweeps: what `python train_cls.py -m ...` does, on this machine or on a cluster.

Every config is checked, and the code is copied, before the first job starts. Then that copy goes on: Hydra composes the
jobs and hands them to its launcher, the basic one, which runs them here one after the other, or submitit's, which
submits them to SLURM. Every job starts torchrun on the same script without `-m`. All that runs, however long it waits
in a queue, is what was submitted.

    outputs/sweeps/2026-11-22_14-05-09/
      jobs.json       the command, the commit, and of each job its name, overrides and run directory
      code/           the code as it was, which the jobs run
      config_dir/     the YAML files of --config-dir as they were
      logs/           what each job printed, also in earlier attempts; NAME.node1.log of a second node
      ends/           how each job ended: exit code, SLURM job id
      slurm/          submitit's files: the sbatch script, its own logs
"""
