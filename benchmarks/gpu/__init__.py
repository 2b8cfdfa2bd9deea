"""Measurements on a GPU in five stages, run by `python -m benchmarks gpu`.

runner.py       rows as JSON lines, the time budget, measurements that failed or were interrupted
plan.py         the stages and their measurements, in order
correctness.py  stage 1: values and gradients of the kernels
kernels.py      stage 2: time of each kernel, cores beside SDPA
search.py       stage 2: search of block sizes, `tiles.json`
models.py       stage 3: throughput of models, time on the host, sampling
curves.py       stage 4: training curves with all data on the device
system.py       stage 5: test suite, exact resume, ranks, signals
report.py       Markdown tables, plots, and the goals
"""
