"""Run a root script on ranks that share one GPU: NCCL refuses this, so gloo replaces it."""

import runpy
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

if __name__ == "__main__":
    init_process_group = dist.init_process_group

    def init_gloo(backend: str, **options: Any) -> None:
        """Replace the backend."""
        init_process_group("gloo", **options)

    dist.init_process_group = init_gloo  # type: ignore[assignment]
    sys.path[0] = str(Path(__file__).parents[2])
    sys.argv = sys.argv[1:]
    runpy.run_path(str(Path(sys.path[0], sys.argv[0])), run_name="__main__")
