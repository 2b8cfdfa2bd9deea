"""Seeds as pure functions of an address such as `(seed, "augment", epoch, index)`, not of a generator's state."""

import hashlib
import random
import struct

import numpy as np
import torch


def derive_seed(*address: int | str) -> int:
    """Return the 63-bit seed of an address, the same on every machine and rank."""
    digest = hashlib.blake2b(digest_size=8)
    for part in address:
        if isinstance(part, str):
            digest.update(part.encode() + b"\0")
        else:
            digest.update(struct.pack("<q", part))
    return int.from_bytes(digest.digest(), "little") >> 1


def seed_torch(*address: int | str) -> None:
    """Seed torch's global generators (dropout, stochastic depth, initialisation) from an address."""
    seed = derive_seed(*address)
    # Not torch.manual_seed: before CUDA is initialized, it records a stack trace of every call (200 us each).
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def seed_everything(*address: int | str) -> None:
    """Seed torch, `random` and numpy from an address."""
    seed_torch(*address)
    seed = derive_seed(*address)
    random.seed(seed)
    np.random.seed(seed % 2**32)
