"""Randomness is addressed, not drawn: every seed is a pure function of where the number is used."""

import hashlib
import random
import struct

import torch


def derive_seed(*address: int | str) -> int:
    """A 63-bit seed for an address such as `(seed, "augment", epoch, index)`: the same on every machine and rank."""
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
    # Not torch.manual_seed: until CUDA is in use, that keeps a stack trace of every call (200 us each) to replay later.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def seed_everything(*address: int | str) -> None:
    """Seed torch, `random` and numpy (where it is installed) from an address, for code that draws from any of them."""
    seed_torch(*address)
    seed = derive_seed(*address)
    random.seed(seed)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(seed % 2**32)
