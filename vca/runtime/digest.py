"""What a file, a set of tensors or of images is, as a sha256: records name what they were made from by it."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def tensors_sha256(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Hex digest of a text and of tensors by name: names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def image_sha256(pixels: Any) -> bytes:
    """Digest of one image, an array `(H, W, C)`: its shape and its bytes."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).digest()


def images_sha256(digests: Iterable[bytes]) -> str:
    """Hex digest of a set of images, from those of its images in order: ranks can share the work."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
