"""Imports the packages that runs use; `tests.processes` forks from a process that has imported this module."""
# ruff: noqa: F401

import gc
import importlib
import pkgutil

import hydra
import matplotlib.pyplot
import numpy
import PIL.Image
import safetensors.torch
import scipy.linalg
import sklearn.datasets
import timm.data
import torch._dynamo
import torch.distributed
import torchvision.datasets
import tqdm

import models
import vca

for package in (models, vca):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)

gc.freeze()  # so that a fork neither traverses nor copies the imported objects; 0.5 s per run
