"""Infrastructure of a run: ranks, devices, seeds, signals, errors, the run directory and its logs."""
