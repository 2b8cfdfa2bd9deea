"""sha256 digests of files, tensors and images; records identify their inputs by them."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def tensors_sha256(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return the hex digest of a text and named tensors: names, dtypes, shapes and bytes, sorted by name."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def image_sha256(pixels: Any) -> bytes:
    """Return the digest of one image, an array `(H, W, C)`: its shape and its bytes."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).digest()


def images_sha256(digests: Iterable[bytes]) -> str:
    """Return the hex digest of a set of images from the ordered digests of its images, so that ranks can split it."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
