"""Make a folder with all that `python -m benchmarks gpu` needs on a machine without network: packages and CIFAR-10.

    python scripts/gpu_bundle.py .bundle --cifar DIR            DIR contains cifar-10-batches-py/
    python3 -m pip install --no-index --no-deps --target .bundle/site .bundle/wheels/*.whl      on the machine
    PYTHONPATH=.bundle/site python3 -m benchmarks gpu --stage 1 --out OUT --root .bundle        on the machine

The machine has Linux, Python 3.12, torch, torchvision, timm, triton, numpy, scipy, safetensors, tqdm, torchdiffeq and
matplotlib. The folder is at most 64 MiB.
"""

import argparse
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
LIMIT = 64 * 2**20  # bytes
PACKAGES = ["hydra-core", "omegaconf", "scikit-learn", "joblib", "cloudpickle", "narwhals", "threadpoolctl"]
# The test suite needs pytest and diffusers, with what they import.
PACKAGES += ["pytest", "pluggy", "iniconfig", "pygments", "pytest-xdist", "execnet", "torch-fidelity", "diffusers"]
PACKAGES += ["regex", "requests", "urllib3", "idna", "certifi", "charset-normalizer", "importlib-metadata", "zipp"]
FROM_SOURCE = "antlr4-python3-runtime==4.9.3"  # of omegaconf; it has no wheel
# Bytes of an image are differences that do not align to anything, so position bits only dilute the statistics.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0}]
Split = tuple[np.ndarray, np.ndarray]  # images (N, 3, 32, 32) uint8, labels (N,)


def pack_images(splits: list[Split]) -> bytes:
    """Pack splits into bytes that compress well: differences to green and to the left and upper pixels, modulo 256."""
    parts = [np.array([len(labels) for _, labels in splits], "<u4").tobytes()]
    for images, labels in splits:
        x = images.copy()
        x[:, ::2] -= images[:, 1:2]
        x[..., 1:] -= x[..., :-1].copy()
        x[..., 1:, :] -= x[..., :-1, :].copy()
        parts += [labels.astype(np.uint8).tobytes(), x.swapaxes(0, 1).tobytes()]
    return b"".join(parts)


def unpack_images(data: bytes) -> list[Split]:
    """Return the training and the held-out split of `pack_images`."""
    counts, position, splits = np.frombuffer(data, "<u4", 2), 8, []
    for count in counts.tolist():
        labels = np.frombuffer(data, np.uint8, count, position)
        x = np.frombuffer(data, np.uint8, 3072 * count, position + count).reshape(3, count, 32, 32).swapaxes(0, 1)
        images = x.cumsum(axis=2, dtype=np.uint8).cumsum(axis=3, dtype=np.uint8)
        images[:, ::2] += images[:, 1:2]
        splits.append((images, labels))
        position += 3073 * count
    return splits


def write_cifar(folder: Path, out: Path, counts: tuple[int, int]) -> None:
    """Write the first images of both splits of CIFAR-10 to `cifar10.xz`."""
    from torchvision.datasets import CIFAR10

    splits = []
    for train, count in zip((True, False), counts, strict=True):
        data = CIFAR10(folder, train=train)
        splits.append((data.data[:count].transpose(0, 3, 1, 2), np.array(data.targets[:count])))
    out.write_bytes(lzma.compress(pack_images(splits), filters=FILTERS))


def gather_wheels(out: Path) -> None:
    """Download the wheels for Python 3.12, with the versions of constraints.txt."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(out), FROM_SOURCE], check=True)
    platforms = [f"--platform=manylinux{name}_x86_64" for name in ("_2_28", "_2_27", "_2_17", "2014", "1")]
    target = ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp", *platforms]
    pinned = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "download", "--no-deps", *target, *pinned, "-d", str(out), *PACKAGES], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--cifar", type=Path, help="folder with cifar-10-batches-py/; without it, packages only")
    parser.add_argument("--images", type=int, nargs=2, default=(20_000, 5_000), metavar=("TRAIN", "TEST"))
    options = parser.parse_args()
    gather_wheels(options.out / "wheels")
    if options.cifar is not None:
        write_cifar(options.cifar, options.out / "cifar10.xz", options.images)
    files = [*options.out.glob("wheels/*.whl"), *options.out.glob("cifar10.xz")]
    for file in files:
        print(f"{file.stat().st_size / 2**20:8.2f} MiB  {file.name}")
    total = sum(file.stat().st_size for file in files)
    print(f"{total / 2**20:8.2f} MiB")
    if total > LIMIT:
        sys.exit(f"{options.out} must be at most {LIMIT / 2**20:.0f} MiB, got {total / 2**20:.1f}; use fewer --images")


if __name__ == "__main__":
    main()
