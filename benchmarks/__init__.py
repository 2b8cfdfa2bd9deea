"""Benchmarks, run by `python -m benchmarks`; results are in benchmarks/README.md."""
