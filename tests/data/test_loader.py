"""The step-addressed loader, the data sets and the augmentation."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing as TimmErasing
from torch.utils.data import DataLoader, default_collate

from tests.support import write_png16
from vca.config import compose
from vca.data import load_dataset
from vca.data.augment import (
    AugmentConfig,
    BatchMixer,
    Normalize,
    RandomErasing,
    eval_transform,
    train_transform,
    worker_transform,
)
from vca.data.loader import (
    Address,
    AddressedImages,
    Batch,
    MicroBatches,
    TrainOrder,
    eval_loader,
    image_inputs,
    train_loader,
)
from vca.evaluation.images import DatasetImages
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError, ImageError, known_cause
from vca.runtime.seeding import derive_seed, seed_everything
from vca.runtime.signals import end_workers, start_worker

CPU = torch.device("cpu")


def world(rank=0, size=1):
    return World(rank, rank, size, CPU)


def digits(*overrides):
    config = compose("train_cls", list(overrides))
    return config, load_dataset(config.data, train=True)


def step_batches(size, micro, first=0, last=4, workers=0, repeats=1, global_batch_size=48):
    """Images, labels and indices of each step's global batch, gathered from all ranks in order."""
    config, images = digits("augment.hflip=0.5", "augment.re_prob=0.5")
    order = TrainOrder(len(images), global_batch_size, seed=3, repeats=repeats)
    steps = [[] for _ in range(first, last)]
    accumulation = global_batch_size // (size * micro)
    for rank in range(size):
        share = MicroBatches(order, world(rank, size), micro, accumulation, first, last)
        inputs = image_inputs(config.augment, config.data, 3, CPU)
        for index, batches in enumerate(train_loader(images, inputs, 3, share, workers)):
            for batch in batches:
                places = list(range(micro))
                places = places[0::2] + places[1::2][::-1]
                back = torch.tensor(places).argsort()
                steps[index].append([tensor[back] for tensor in batch[:5]])
    return [[torch.cat(parts) for parts in zip(*step, strict=True)] for step in steps]


def assert_equal_batches(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "how",
    [{"size": 2, "micro": 24}, {"size": 4, "micro": 12}, {"size": 3, "micro": 4}, {"size": 1, "micro": 12}],
    ids=str,
)
def test_train_loader_independent_of_ranks(how):
    assert_equal_batches(step_batches(1, 48), step_batches(**how))


def test_train_loader_independent_of_workers_and_resume():
    whole = step_batches(1, 48, last=6)
    assert_equal_batches(whole, step_batches(1, 48, last=6, workers=2))
    assert_equal_batches(whole[3:], step_batches(2, 24, first=3, last=6))


def test_augmentation_differs_between_epochs_and_seeds():
    config, images = digits("augment.re_prob=1.0")

    def image(address, seed=0):
        inputs = image_inputs(config.augment, config.data, seed, CPU)
        item = AddressedImages(images, inputs, seed)[address]
        return inputs.to_device(Batch(*default_collate([item])), CPU).images

    first = image(Address(0, 5, 0))
    assert torch.equal(first, image(Address(0, 5, 0)))
    assert not torch.equal(first, image(Address(1, 5, 0)))
    assert not torch.equal(first, image(Address(0, 5, 1)))
    assert not torch.equal(first, image(Address(0, 5, 0), seed=1))


def test_image_inputs_equal_whole_transform(tmp_path):
    """uint8 from the worker, normalised on the device, gives the pixels of the recipe's transform to the bit."""
    write_image_folder(tmp_path)
    options = ["data=imagefolder", f"data.root={tmp_path}", "data.num_classes=2", "data.img_size=32"]
    config, images = digits(*options, "augment=imagenet", "augment.re_prob=0")
    inputs = image_inputs(config.augment, config.data, 0, CPU)
    whole = train_transform(config.augment, config.data)
    for address in (Address(0, 1, 0), Address(3, 5, 1)):
        item = AddressedImages(images, inputs, 0)[address]
        assert item[0].dtype == torch.uint8
        batch = inputs.to_device(Batch(*default_collate([item])), CPU)
        seed_everything(0, "augment", *address)
        assert torch.equal(batch.images[0], whole(images[address.image][0]))
    evaluated = Normalize(config.data, CPU)(worker_transform(eval_transform(config.data))(images[1][0])[None])[0]
    assert torch.equal(evaluated, eval_transform(config.data)(images[1][0]))


@pytest.mark.parametrize(("mode", "count"), [("pixel", 1), ("const", 1), ("rand", 3)])
def test_random_erasing_equals_timm(mode, count):
    """The same boxes from the same state of `random`, with a fill of the same kind."""
    erasing = RandomErasing(AugmentConfig(re_prob=0.7, re_mode=mode, re_count=count), seed=3)
    theirs = TimmErasing(0.7, mode=mode, max_count=count, device="cpu")
    images = torch.full((40, 3, 24, 32), 7.0)
    random.seed(5)
    boxes = torch.stack([erasing.draw(24, 32) for _ in range(40)])
    erasing.fill(images, boxes, torch.arange(40))
    random.seed(5)
    for index, ours in enumerate(images):
        expected = theirs(torch.full((3, 24, 32), 7.0))
        assert torch.equal(ours == 7, expected == 7)
        again = torch.full((1, 3, 24, 32), 7.0)
        erasing.fill(again, boxes[index : index + 1], torch.tensor([index]))
        assert torch.equal(again[0], ours), "depends on the batch"
    fill = images[images != 7]
    assert 0.1 < len(fill) / images.numel() < 0.25
    if mode == "const":
        assert (fill == 0).all()
    else:
        assert abs(fill.mean()) < 0.2
        assert 0.8 < fill.std() < 1.2
        assert (len(fill.unique()) > 1000) == (mode == "pixel")


@pytest.mark.parametrize(("images", "batch"), [(103, 10), (96, 48), (10, 32)])
def test_train_order_epoch_visits_every_image_once(images, batch):
    order = TrainOrder(images, batch, seed=0)
    stream = [order.address(position) for position in range(3 * images)]
    for epoch in range(3):
        part = stream[epoch * images : (epoch + 1) * images]
        assert sorted(address.image for address in part) == list(range(images))
        assert {address.epoch for address in part} == {epoch}
    assert [a.image for a in stream[:images]] != [a.image for a in stream[images : 2 * images]]


def test_train_order_repeated_augmentation():
    """An epoch has three copies of a third of the images; most copies are not mixed with each other."""
    order = TrainOrder(120, 60, seed=0, repeats=3)
    epoch = [a for step in range(2) for a in order.batch(step, 0, 60)]
    counts = np.bincount([a.image for a in epoch], minlength=120)
    assert sorted(set(counts)) == [0, 3]
    assert (counts == 3).sum() == 40
    assert all(sorted(a.repeat for a in epoch if a.image == i) == [0, 1, 2] for i in np.flatnonzero(counts))
    pairs = [epoch[p].image == epoch[p + 1].image for p in range(0, 120, 2)]
    assert sum(pairs) < 10
    assert_equal_batches(step_batches(1, 48, repeats=3), step_batches(4, 6, repeats=3))


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_batch_mixer_independent_of_micro_batches(cut):
    """Mixup and CutMix of a global batch do not depend on the number of micro-batches."""
    mixer = BatchMixer(AugmentConfig(mixup=0.8, cutmix=1.0, label_smoothing=0.1), num_classes=5, seed=0)
    torch.manual_seed(0)
    images, labels = torch.randn(16, 1, 8, 8), torch.randint(5, (16,))

    def mixed(step, cut):
        size = 16 // cut
        places = list(range(size))
        places = torch.tensor(places[0::2] + places[1::2][::-1])
        out_images, out_targets = torch.empty_like(images), torch.empty(16, 5)
        for start in range(0, 16, size):
            where = start + places
            x, y = mixer(images[where], labels[where], step)
            out_images[where], out_targets[where] = x, y
        return out_images, out_targets

    for step in range(6):
        whole, parts = mixed(step, 1), mixed(step, cut)
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
        torch.testing.assert_close(whole[1].sum(1), torch.ones(16))
    assert not torch.equal(mixed(0, 1)[0], mixed(1, 1)[0])
    before = images.clone()
    mixer(images, labels, 0)
    assert torch.equal(images, before), "the batch was changed in place"


def test_batch_mixer_label_smoothing_without_mixing():
    mixer = BatchMixer(AugmentConfig(label_smoothing=0.1), num_classes=4, seed=0)
    images = torch.randn(2, 1, 2, 2)
    same, targets = mixer(images, torch.tensor([1, 3]), 0)
    assert torch.equal(same, images)
    torch.testing.assert_close(targets[0], torch.tensor([0.025, 0.925, 0.025, 0.025]))


def test_digits_split_sizes_and_normalisation():
    config, train = digits()
    held_out = load_dataset(config.data, train=False)
    assert (len(train), len(held_out)) == (1438, 359)
    assert set(train.labels) == set(held_out.labels) == set(range(10))
    image = eval_transform(config.data)(train[0][0])
    assert image.shape == (1, 8, 8)
    pixels = torch.stack([eval_transform(config.data)(train[i][0]) for i in range(len(train))])
    assert abs(pixels.mean()) < 0.01
    assert abs(pixels.std() - 1) < 0.01


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_eval_loader_ranks_cover_set_once(count):
    config, _ = digits()
    images = load_dataset(config.data, train=False)
    loaders = [
        eval_loader(images, worker_transform(eval_transform(config.data)), world(r, count), 50, 0) for r in range(count)
    ]
    labels = [label for loader in loaders for _, batch in loader for label in batch.tolist()]
    assert sorted(labels) == sorted(images.labels)


def write_image_folder(root, classes=("cat", "dog"), images=4, splits=("train", "val")):
    generator = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(images):
                pixels = generator.integers(0, 256, (30, 40 + index, 3), dtype=np.uint8)
                image = Image.fromarray(pixels) if index else Image.fromarray(pixels[..., 0])  # one of them is grey
                image.save(folder / f"{index}.jpg")


def test_imagefolder_loads_and_transforms(tmp_path):
    write_image_folder(tmp_path)
    options = ["data=imagefolder", f"data.root={tmp_path}", "data.img_size=32", "augment=imagenet"]
    config, images = digits(*options, "data.num_classes=2")
    assert len(images) == 8
    augmented = AddressedImages(images, image_inputs(config.augment, config.data, 0, CPU), 0)[Address(0, 0, 0)][0]
    assert augmented.shape == eval_transform(config.data)(images[0][0]).shape == (3, 32, 32)


def test_randaugment_accepts_every_magnitude():
    """Magnitude 9 with noise of 0.5 can be 10, where posterize keeps 0 bits, an error in Pillow 13."""
    config = compose("train_cls", ["data=imagefolder", "augment=imagenet"])
    randaugment = next(t for t in train_transform(config.augment, config.data).transforms if hasattr(t, "ops"))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    for operation in randaugment.ops:
        operation.prob, operation.magnitude_std = 1.0, 0.0
        for magnitude in (0, 5, 9, 10):
            operation.magnitude = magnitude
            assert operation(picture).size == (24, 24), operation


def test_seeding_deterministic_and_distinct_per_address():
    assert derive_seed(1, "a", 2) == derive_seed(1, "a", 2)
    addresses = [(1, "a", 2), (1, "a", 3), (2, "a", 1), (1, "b", 2), (1, 2), (12,)]
    assert len({derive_seed(*address) for address in addresses}) == len(addresses)
    assert derive_seed(0, "order", 0) == 3801269635843653784  # the same on every machine, or runs are not reproducible
    seed_everything(5, "x")
    drawn = (torch.rand(1), np.random.rand())
    seed_everything(5, "x")
    assert drawn == (torch.rand(1), np.random.rand())


class Unsendable:
    """A batch for which shared memory is full when it is sent, not when it is made."""

    def __reduce__(self):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
        )


@pytest.mark.process
def test_loader_worker_that_cannot_send_a_batch_ends():
    """Not a batch that is waited for without end."""
    loader = DataLoader([0, 1], num_workers=1, collate_fn=lambda items: Unsendable(), worker_init_fn=start_worker)
    with pytest.raises(RuntimeError, match="DataLoader worker") as caught:
        next(iter(loader))
    assert known_cause(caught.value).startswith("/dev/shm is full; start the container")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.process)])
def test_load_imagefolder_16_bit_rgb_refused_when_read(tmp_path, workers):
    """The check before a run reads only a sample of a large data set, so the error also comes from reading."""
    write_image_folder(tmp_path)
    write_png16(tmp_path / "train" / "cat" / "deep.png")
    _, images = digits("data=imagefolder", f"data.root={tmp_path}", "data.num_classes=2")
    assert images[0][0].mode == "RGB"
    number = next(index for index in range(len(images)) if images.index.source(index).endswith("deep.png"))
    problem = "has 16 bits per channel, which would be truncated; convert it to 8 bits"
    with pytest.raises(ImageError, match=rf"cat/deep.png cannot be read \({problem}\)"):
        list(eval_loader(images, lambda image: torch.zeros(1), world(), 4, workers))
    end_workers()  # as `distributed.start` does; the collection of a loader waits 10 s for each of its workers
    with pytest.raises(ConfigError, match=rf"^\S+cat/deep.png: {problem}$"):
        DatasetImages(images, 8, 3, "photos", "reference").read([number])
