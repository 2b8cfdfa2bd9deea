#!/usr/bin/env bash
# Everything that benchmarks/README.md lists as not measured on a GPU, but for the long training.
set -euo pipefail
cd "$(dirname "$0")/.."
python scripts/benchmark.py attention --device cuda --json benchmarks/results/cuda-attention.json
python scripts/benchmark.py loop --device cuda --json benchmarks/results/cuda-loop.json
python -m pytest
