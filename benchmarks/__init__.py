"""Timings that can be repeated; `scripts/benchmark.py` runs them, README.md says what they have shown."""
