"""Train a class-conditional generator on pixels, on images through an autoencoder, or on a cache of latents.

    python train_gen.py                                                     a small VCA DiT on handwritten digits
    python train_gen.py objective=interpolant sampler=ode                   the same network as a SiT
    python train_gen.py attention=softmax                                   the baseline
    torchrun --nproc_per_node=8 train_gen.py experiment=table2/dit_s_2_vca data.root=LATENTS

While it trains, a run draws samples of its EMA weights into `outputs/<name>/samples/`, and may measure them:
`trainer.fid_every=10000 extractor=inception fid.reference=STATISTICS.npz`. The same command continues a run that was
interrupted, to the bit. `--cfg job --resolve` prints the whole config.
"""

import math
from pathlib import Path
from typing import Any

import torch

from models import GENERATORS, build_model, rebuild
from vca.attention import ATTENTIONS, backend_of
from vca.config import TrainGenConfig, command_line, register_schemas
from vca.data import identify_files, load_dataset
from vca.data.augment import train_transform
from vca.data.doctor import check_before_training
from vca.data.latents import LatentCache, RandomVersion
from vca.data.loader import MicroBatches, TrainOrder, train_loader
from vca.evaluation.evaluate import check_comparable, read_features
from vca.evaluation.extractor import EXTRACTORS, load_extractor
from vca.evaluation.features import measure
from vca.evaluation.frechet import frechet_distance
from vca.evaluation.sources import open_source
from vca.generation.autoencoder import AUTOENCODERS, load_autoencoder
from vca.generation.generator import DrawnSet, Generator
from vca.generation.objective import OBJECTIVES, build_objective
from vca.generation.sampling import check_sampler, draw_samples, save_grid, to_uint8
from vca.runtime import distributed
from vca.runtime.compute import Precision, set_precision
from vca.runtime.errors import NonFiniteError, config_errors
from vca.runtime.rundir import RunDirectory, check_ranks_agree, plain
from vca.runtime.seeding import seed_torch
from vca.training.generation import GenerationLoss
from vca.training.run import TrainingRun
from vca.training.step import TrainState

register_schemas(
    root={"train_gen": TrainGenConfig},
    groups={
        "model": GENERATORS,
        "attention": ATTENTIONS,
        "objective": OBJECTIVES,
        "autoencoder": AUTOENCODERS,
        "extractor": EXTRACTORS,
    },
)


def run(config: TrainGenConfig) -> dict[str, float]:
    """Train, or go on training, and return the last training loss as `loss`."""
    trainer = config.trainer
    with distributed.start(trainer.device.value, trainer.timeout_minutes) as world:
        check_ranks_agree(world, config)
        set_precision(trainer.precision, trainer.deterministic)
        folder = RunDirectory(Path(config.out_dir) / config.name)
        micro_batch, accumulation = trainer.micro_batch_on(world.size)
        objective = build_objective(config.objective)
        check_sampler(objective, config.sampler, config.model.class_dropout_prob)

        images = load_dataset(config.data, train=True)
        autoencoder = load_autoencoder(config.autoencoder, world.device)
        if cached := isinstance(images, LatentCache):
            images.check(autoencoder.identity(), config.augment)
        cache = images.manifest.identity() if cached else None
        inputs = {"autoencoder": autoencoder.identity(), "cache": cache}
        record = {**plain(config), "inputs": inputs, **identify_files(world, train=images)}
        folder.check(record)
        seed_torch(config.seed, "model")
        with config_errors():
            model = build_model(config.model, config.attention)
            attention = config.attention.name + backend_of(model, world.device, trainer.precision.compute_dtype)
            model.set_grad_checkpointing(trainer.grad_checkpointing)
        order = TrainOrder(len(images), trainer.global_batch, config.seed, config.augment.repeats)
        state = TrainState(model, trainer, config.optim, world, order.steps_per_epoch)

        training = TrainingRun(folder, state, trainer, world)
        training.resume()
        evaluations = {"samples"} | ({"frechet"} if trainer.fid_every else set())
        if not (training.finished and evaluations <= training.reported):
            image_bytes = 4 * math.prod(images.manifest.shape[1:]) if cached else config.data.image_bytes
            check_before_training(config.data, [images], trainer.workers, micro_batch * image_bytes, world)
            transform = RandomVersion(config.augment.hflip) if cached else train_transform(config.augment, config.data)
            dropout = model.config.class_dropout_prob
            loss_of = GenerationLoss(objective, autoencoder, cached, dropout, model.null_label, config.seed)
            generator = Generator(trained(state), objective, autoencoder)
            measured = Measured(config, generator, world) if trainer.fid_every else None
            with training.open(config.name, record, config.wandb):
                data = f"{config.data.name}: {len(images)} images of {math.prod(config.model.grid)} tokens"
                training.introduce(config.name, f"{config.model.name} with {attention}", data)
                shares = MicroBatches(order, world, micro_batch, accumulation, state.step, state.total_steps)
                loader = train_loader(images, transform, config.seed, shares, trainer.workers)

                def evaluate_if_due() -> None:
                    if training.due(trainer.eval_every, "samples"):
                        training.write(draw_picture(config, generator, training))
                        training.draw(config.name)
                    if measured is not None and training.due(trainer.fid_every, "frechet"):
                        training.write(measured.frechet(training))

                evaluate_if_due()  # if a kill came between checkpoint and evaluation
                for batches in training.timing(loader):
                    update = state.update([batch.to(world.device) for batch in batches], loss_of, config.seed)
                    training.record(update, batches)
                    if training.due(trainer.checkpoint_every):
                        training.save()
                    training.leave_if_asked()
                    evaluate_if_due()
        return summarize(config, folder, world.is_main)


def trained(state: TrainState) -> Any:
    """The network whose samples count: the EMA, or where there is none the raw one."""
    return state.ema.module if state.ema is not None else state.model


def draw_picture(config: TrainGenConfig, generator: Generator, training: TrainingRun) -> dict[str, int]:
    """Draw samples on one rank, a column for each class; one that is not finite is black.

    Returns how many they are, and how often the network was evaluated for each.
    """
    if not training.world.is_main:
        return {}
    generator.model.eval()
    labels = torch.arange(config.sampled_classes, device=training.world.device).repeat(config.samples_per_class)
    training.reporter.say(f"sampling {len(labels)} images")
    samples = draw_samples(
        generator.model, generator.objective, config.sampler, labels, range(len(labels)), config.seed, generator.shape
    )
    images = generator.autoencoder.decode(samples.x)
    finite = torch.isfinite(images).flatten(1).all(dim=1)
    if failed := int((~finite).sum()):
        training.reporter.say(f"warning: {failed} of {len(labels)} samples are NaN or infinite")
    pictures = to_uint8(images.where(finite[:, None, None, None], -1.0))
    file = training.folder.path / "samples" / f"step_{training.state.step:08d}.png"
    with training.reporter.expendable(file.parent):
        save_grid(pictures, file, columns=config.sampled_classes)
    return {"samples": len(labels), "evaluations": samples.evaluations}


class Measured:
    """The samples of a run as `eval_fid.py` would draw and measure them at this step.

    Args:
        config: `fid`, `extractor` and `sampler` say how.
        generator: of the run.
        world: this process; all ranks share the work.
    """

    def __init__(self, config: TrainGenConfig, generator: Generator, world: distributed.World) -> None:
        self.generator, self.world, self.fid = generator, world, config.fid
        self.extractor = load_extractor(config.extractor, world, rebuild)
        self.samples = DrawnSet(
            generator, config.sampler, "random", 0, Precision.fp32, self.fid.count, self.fid.batch_size
        )
        reference = open_source(str(self.fid.reference), "fid.reference", config.data, reference=True)
        for warning in check_comparable(self.samples, reference, self.extractor, allow_few=True):
            if world.is_main:
                print(f"fid: {warning}", flush=True)
        self.reference = read_features(reference, self.extractor, world, self.fid.batch_size, keep=0)

    def frechet(self, training: TrainingRun) -> dict[str, float | None]:
        """The distance from the reference, null if a sample is not finite, and of how many samples."""
        self.generator.model.eval()
        training.reporter.say(f"sampling {self.fid.count} images for the Frechet distance")
        try:
            found = measure(self.samples, self.extractor, self.world, self.fid.batch_size, keep=0)
            distance = frechet_distance(*found.pool, *self.reference.pool)
        except NonFiniteError as error:
            training.reporter.say(f"warning: no Frechet distance: {error}")
            distance = None
        return {"frechet": distance, "frechet_samples": self.fid.count}


def summarize(config: TrainGenConfig, folder: RunDirectory, talk: bool) -> dict[str, float]:
    """Print the last loss and return it."""
    losses = [record["loss"] for record in folder.records() if record.get("loss") is not None]
    result = {"loss": losses[-1]} if losses else {}
    if talk and result:
        print(
            f"{config.out_dir}/{config.name}: loss {result['loss']:.4f}, pictures in {folder.path}/samples/", flush=True
        )
    return result


if __name__ == "__main__":
    command_line("train_gen", run)
