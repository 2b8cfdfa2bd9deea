"""Run a script of timm with the models of this project registered.

python -m models ../pytorch-image-models/train.py --model vca_deit_tiny_patch16_224 --data-dir /data/imagenet
"""

import runpy
import sys

import models

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m models SCRIPT.py [arguments of the script]")
    models.register_timm()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
