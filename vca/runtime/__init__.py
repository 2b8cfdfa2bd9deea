"""Running a job: ranks and devices, seeds, the run directory and what is written into it. torch and the standard
library only."""
