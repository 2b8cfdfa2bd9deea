"""Train a class-conditional generator on pixels, on images through an autoencoder, or on a cache of latents.

    python train_gen.py                                                     a small VCA DiT on handwritten digits
    python train_gen.py objective=interpolant sampler=ode_heun                   the same network as a SiT
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
from vca.cli import command_line
from vca.config import TrainGenConfig, register_schemas
from vca.data import identify_files, load_dataset
from vca.data.doctor import check_before_training
from vca.data.loader import MicroBatches, TrainOrder, train_loader
from vca.evaluation.extractor import EXTRACTORS, load_extractor
from vca.evaluation.online_fid import OnlineFid
from vca.generation.autoencoder import AUTOENCODERS, load_autoencoder
from vca.generation.objective import OBJECTIVES, build_objective
from vca.generation.pipeline import DiffusionPipeline, check_sampler, sample_latents, save_image_grid, to_uint8
from vca.runtime import distributed
from vca.runtime.compute import set_precision
from vca.runtime.errors import config_errors
from vca.runtime.rundir import RunDirectory, check_ranks_agree, to_dict
from vca.runtime.seeding import seed_torch
from vca.training.generation import GenerationLoss, generation_data
from vca.training.run import TrainingRun
from vca.training.step import TrainState


def register_configs() -> None:
    """Register the config schemas of this script with Hydra."""
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
        micro_batch_size, accumulation = trainer.micro_batch_on(world.size)
        objective = build_objective(config.objective)
        check_sampler(objective, config.sampler, config.model.class_dropout_prob)

        dataset = load_dataset(config.data, train=True)
        autoencoder = load_autoencoder(config.autoencoder, world.device)
        data = generation_data(dataset, config.data, config.augment, autoencoder)
        inputs = {"autoencoder": autoencoder.identity(), "cache": data.cache}
        record = {**to_dict(config), "inputs": inputs, **identify_files(world, train=data.dataset)}
        folder.check(record)
        seed_torch(config.seed, "model")
        with config_errors():
            model = build_model(config.model, config.attention)
            attention = config.attention.name + backend_of(model, world.device, trainer.precision.compute_dtype)
            model.set_grad_checkpointing(trainer.grad_checkpointing)
        order = TrainOrder(len(data.dataset), trainer.global_batch_size, config.seed, config.augment.aug_repeats)
        state = TrainState(model, trainer, config.optim, world, order.steps_per_epoch)

        training = TrainingRun(folder, state, trainer, world)
        training.resume()
        due_at_end = {"samples"} | ({"frechet"} if trainer.fid_every else set())
        if not (training.finished and due_at_end <= training.reported):
            check_before_training(
                config.data, [data.dataset], trainer.workers, micro_batch_size * data.item_bytes, world
            )
            dropout = model.config.class_dropout_prob
            loss_of = GenerationLoss(objective, autoencoder, data.cached, dropout, model.null_label, config.seed)
            generator = DiffusionPipeline(trained(state), objective, autoencoder)
            online_fid = None
            if trainer.fid_every:
                extractor = load_extractor(config.extractor, world, rebuild)
                online_fid = OnlineFid(config.fid, extractor, config.sampler, config.data, generator, world)
            with training.open(config.name, record, config.wandb):
                size = f"{config.data.name}: {len(data.dataset)} images of {math.prod(config.model.grid)} tokens"
                training.log_setup(config.name, f"{config.model.name} with {attention}", size)
                shares = MicroBatches(order, world, micro_batch_size, accumulation, state.step, state.total_steps)
                loader = train_loader(data.dataset, data.transform, config.seed, shares, trainer.workers)

                def evaluate_if_due() -> None:
                    if training.due(trainer.eval_every, "samples"):
                        training.write(save_samples(config, generator, training))
                        training.draw(config.name)
                    if online_fid is not None and training.due(trainer.fid_every, "frechet"):
                        training.write(online_fid.measure(training.reporter.log))

                evaluate_if_due()  # if a kill came between checkpoint and evaluation
                for batches in training.timing(loader):
                    update = state.train_step([batch.to(world.device) for batch in batches], loss_of, config.seed)
                    training.record(update, batches)
                    if training.due(trainer.checkpoint_every):
                        training.save()
                    training.exit_if_signalled()
                    evaluate_if_due()
        return summarize(config, folder, world.is_main)


def trained(state: TrainState) -> Any:
    """The network whose samples count: the EMA, or where there is none the raw one."""
    return state.ema.module if state.ema is not None else state.model


def save_samples(config: TrainGenConfig, generator: DiffusionPipeline, training: TrainingRun) -> dict[str, int]:
    """Draw samples on one rank, a column for each class; one that is not finite is black.

    Returns how many they are, and how often the network was evaluated for each.
    """
    if not training.world.is_main:
        return {}
    generator.model.eval()
    labels = torch.arange(config.sampled_classes, device=training.world.device).repeat(config.samples_per_class)
    training.reporter.log(f"sampling {len(labels)} images")
    samples = sample_latents(
        generator.model, generator.objective, config.sampler, labels, range(len(labels)), config.seed, generator.shape
    )
    images = generator.autoencoder.decode(samples.x)
    finite = torch.isfinite(images).flatten(1).all(dim=1)
    if failed := int((~finite).sum()):
        training.reporter.log(f"warning: {failed} of {len(labels)} samples are NaN or infinite")
    pictures = to_uint8(images.where(finite[:, None, None, None], -1.0))
    file = training.folder.path / "samples" / f"step_{training.state.step:08d}.png"
    with training.reporter.expendable(file.parent):
        save_image_grid(pictures, file, columns=config.sampled_classes)
    return {"samples": len(labels), "nfe": samples.nfe}


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
    register_configs()
    command_line("train_gen", run)
