"""The stages and their measurements. Each list begins with what would change most: its first minutes count most."""

from signal import SIGKILL, SIGUSR1

from benchmarks.gpu import correctness, kernels, models, search, system
from benchmarks.gpu.curves import measurements
from benchmarks.gpu.models import throughput
from benchmarks.gpu.runner import Measurement, Stage

SMALL = [("deit_small", 224), ("dit_s_2", 256)]
LONG = [("deit_small", 384), ("deit_small", 1024), ("dit_s_2", 512), ("dit_s_2", 1024)]
TABLE1 = [("deit_tiny", 224), ("deit_small", 224), ("pvt_tiny", 224), ("swin_tiny", 224), ("cswin_tiny", 224)]
TABLE2 = [(f"dit_{size}_{patch}", 256) for size in "sb" for patch in (2, 4, 8)]
HIGH = [("deit_tiny", 1024), ("pvt_tiny", 896), ("swin_tiny", 896), ("cswin_tiny", 896), ("dit_b_2", 1024)]

STAGES = {
    1: Stage(
        "correctness of the kernels",
        [
            Measurement("errors at shapes of training", correctness.training_shapes, 1.0),
            Measurement("tests of the kernels", system.suite("tests/attention/test_kernels.py"), 1.5),
            Measurement("replays of CUDA graphs", correctness.captured, 0.3),
            Measurement("errors with each option", correctness.options, 1.0),
            Measurement("errors at each head dim", correctness.head_dims, 2.0),
        ],
    ),
    2: Stage(
        "time of the kernels",
        [
            Measurement("kernels", kernels.kernels, 0.3),
            Measurement("cores", kernels.cores, 0.4),
            Measurement("parts of a layer", kernels.parts, 0.2),
            Measurement("search of block sizes", search.search, 1.5),
            Measurement("layers", kernels.layers, 1.0),
        ],
    ),
    3: Stage(
        "whole models",
        [
            Measurement("models", throughput(*SMALL), 0.5),
            Measurement("host", models.host, 0.3),
            Measurement("long inputs", throughput(*LONG), 1.2),
            Measurement("compiled", throughput(*SMALL, compiled=True), 1.5),
            Measurement("sampling", models.sampling, 0.7),
            Measurement("rows of Table 1", throughput(*TABLE1), 1.2),
            Measurement("rows of Table 2", throughput(*TABLE2), 1.2),
            Measurement("fp32 and tf32", throughput(*SMALL, precisions=("fp32", "tf32")), 1.0),
            Measurement("loop", models.loop, 0.5),
            Measurement("high resolution", throughput(*HIGH), 1.5),
        ],
    ),
    4: Stage(
        "training of each attention",
        list(measurements()),
    ),
    5: Stage(
        "the project on a GPU",
        [
            Measurement("resume of a classifier after SIGKILL", system.resume("train_cls.py", SIGKILL), 0.5),
            Measurement("resume of a generator after SIGUSR1", system.resume("train_gen.py", SIGUSR1), 0.5),
            Measurement("one and two processes on one GPU", system.ranks, 1.0),
            Measurement("all tests", system.suite("tests"), 4.0),
        ],
    ),
}
