"""Timings that can be repeated; `python -m benchmarks` runs them, README.md says what they have shown."""
