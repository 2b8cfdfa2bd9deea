"""Sweeps: `python train_cls.py -m ...`, on this machine or on SLURM.

Before the first job starts, every config is checked and the code is copied. The launcher then runs from that copy, so
that later edits do not affect queued jobs: Hydra composes the jobs and passes them to its basic launcher, which runs
them one after the other, or to submitit, which submits them to SLURM. Each job runs the script under torchrun.

    outputs/sweeps/2026-11-22_14-05-09/
      jobs.json       the command, the commit, and the name, overrides and run directory of each job
      code/           copy of the code that the jobs run
      config_dir/     copy of the YAML files of --config-dir
      logs/           output of each job, all attempts; NAME.node1.log for a second node
      ends/           exit code, duration and SLURM job id of each job
      slurm/          submitit's files: the sbatch script and its logs
"""
