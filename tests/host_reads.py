"""Counts the operations for which the host would wait for a GPU, on a CPU."""

import sys
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh", "unique")
COMPOSITE_READS = ("item", "argwhere", "nonzero_numpy", "allclose")  # inference mode does not decompose them


def blocking_copy(arguments, options):
    """Whether these arguments of `Tensor.to` name a device, or a tensor on it, without `non_blocking`."""
    device = any(isinstance(argument, (torch.device, str, torch.Tensor)) for argument in arguments)
    positional = len(arguments) > 2 and arguments[2] is True
    return (device or "device" in options) and not (positional or options.get("non_blocking", False))


class HostReads(TorchDispatchMode):
    """Counts operations in `counts[place, name]`, where `place` is set by the test; None counts nothing.

    These are reads of a tensor's values, operations whose output shape depends on values, tensors made from Python
    numbers, which are copied from pageable memory, and copies to a device or from it that are not `non_blocking`. Reads
    of int64 tensors by `tolist` and `numpy` are not counted: indices, fingerprints, boxes and the sum of stop signals
    stay on the CPU.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts = Counter()

        def watch(name, counts):
            method = getattr(torch.Tensor, name)

            def watched(tensor, *arguments, **options):
                # torch moves the norm of each gradient to the device on which it already is.
                clipping = sys._getframe(1).f_code.co_filename.endswith("clip_grad.py")
                if not clipping and counts(tensor, arguments, options):
                    self.count(name)
                return method(tensor, *arguments, **options)

            monkeypatch.setattr(torch.Tensor, name, watched)

        for name in ("tolist", "numpy", "cpu"):
            watch(name, lambda tensor, arguments, options: tensor.dtype is not torch.int64)
        watch("to", lambda tensor, arguments, options: blocking_copy(arguments, options))
        watch("cuda", lambda tensor, arguments, options: not options.get("non_blocking", False))

    @property
    def place(self):
        return None

    def count(self, name):
        if self.place is not None:
            self.counts[self.place, name] += 1

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if name in READS + COMPOSITE_READS:
            self.count(name)
        return function(*arguments, **(options or {}))
