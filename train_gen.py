"""Train a class-conditional generator on pixels, on images through an autoencoder, or on cached latents.

    python train_gen.py                                                     a small VCA DiT on handwritten digits
    python train_gen.py objective=interpolant sampler=ode_heun              the same network as a SiT
    python train_gen.py attention=softmax                                   the softmax baseline
    torchrun --nproc_per_node=8 train_gen.py experiment=table2/dit_s_2_vca data.root=LATENTS

A run saves samples of its EMA weights in `outputs/<name>/samples/` every `trainer.eval_every` steps, and can measure
their FID: `trainer.fid_every=10000 extractor=inception fid.reference=STATISTICS.npz`.

Rerun the same command to resume an interrupted run, bit-exactly. `--cfg job --resolve` prints the whole config.
"""

import math
from functools import partial
from pathlib import Path

import torch

from models import GENERATORS, build_model, rebuild
from vca.attention import backend_of
from vca.cli import command_line
from vca.config import TrainGenConfig, generator_groups, register_schemas
from vca.data import identify_files, load_dataset
from vca.data.doctor import check_before_training
from vca.data.loader import MicroBatches, TrainOrder, train_loader
from vca.evaluation.complexity import count_macs
from vca.evaluation.extractor import EXTRACTORS, load_extractor
from vca.evaluation.online_fid import OnlineFid
from vca.generation.autoencoder import load_autoencoder
from vca.generation.objective import build_objective
from vca.generation.pipeline import DiffusionPipeline, check_sampler, sample_latents, save_image_grid, to_uint8
from vca.runtime import distributed
from vca.runtime.compute import set_precision
from vca.runtime.errors import config_errors
from vca.runtime.rundir import RunDirectory, check_ranks_agree, to_dict
from vca.runtime.seeding import seed_torch
from vca.training.generation import GenerationLoss, generation_inputs
from vca.training.run import TrainingRun, log_on_main
from vca.training.step import TrainState


def register_configs() -> None:
    register_schemas(
        root={"train_gen": TrainGenConfig}, groups={**generator_groups(GENERATORS), "extractor": EXTRACTORS}
    )


def run(config: TrainGenConfig) -> dict[str, float]:
    """Start or resume a run, and return its last training loss as `loss`."""
    trainer = config.trainer
    with distributed.start(trainer.device.value, trainer.timeout_minutes) as world:
        check_ranks_agree(world, config)
        set_precision(trainer.precision, trainer.deterministic)
        run_dir = RunDirectory(Path(config.out_dir) / config.name)
        micro_batch_size, accumulation = trainer.micro_batch_on(world.size)
        objective = build_objective(config.objective, world.device)
        check_sampler(objective, config.sampler, config.model.class_dropout_prob)

        log_on_main(world, f"{config.name}: loading data={config.data.name}")
        dataset = load_dataset(config.data, True, world)
        autoencoder = load_autoencoder(config.autoencoder, world.device)
        inputs, cache = generation_inputs(dataset, config.data, config.augment, autoencoder, config.seed)
        origin = {"autoencoder": autoencoder.identity(), "cache": cache}
        record = {**to_dict(config), "inputs": origin, **identify_files(train=dataset)}
        run_dir.check(record)

        seed_torch(config.seed, "model")
        with config_errors():
            model = build_model(config.model, config.attention)
            attention = config.attention.name + backend_of(model, world.device, trainer.precision.compute_dtype)
            model.set_grad_checkpointing(trainer.grad_checkpointing)

        order = TrainOrder(len(dataset), trainer.global_batch_size, config.seed, config.augment.aug_repeats)
        state = TrainState(model, trainer, config.optim, world, order.steps_per_epoch)
        training = TrainingRun(run_dir, state, trainer, world)
        training.resume()
        due_at_end = {"samples"} | ({"frechet"} if trainer.fid_every else set())
        if not (training.finished and due_at_end <= training.reported):
            batch_bytes = micro_batch_size * inputs.item_bytes
            check_before_training(config.data, [dataset], trainer.workers, batch_bytes, world)
            cached, dropout = cache is not None, model.config.class_dropout_prob
            loss_of = GenerationLoss(objective, autoencoder, cached, dropout, model.null_label)
            sampled_model = state.ema.module if state.ema is not None else state.model
            pipeline = DiffusionPipeline(sampled_model, objective, autoencoder)
            online_fid = None
            if trainer.fid_every:
                extractor = load_extractor(config.extractor, world, rebuild)
                online_fid = OnlineFid(config.fid, extractor, config.sampler, config.data, pipeline, world)
            with training.open(config.name, record, config.logger, config.wandb):
                images = f"{config.data.name}: {len(dataset)} images of {math.prod(config.model.grid)} tokens"
                macs = partial(count_macs, build_model, config.model, config.attention)
                training.log_setup(config.name, f"{config.model.name} with {attention}", images, macs)
                micro_batches = MicroBatches(
                    order, world, micro_batch_size, accumulation, state.step, state.total_steps
                )
                loader = train_loader(dataset, inputs, config.seed, micro_batches, trainer.workers)

                def evaluate_if_due() -> None:
                    if training.due(trainer.eval_every, "samples"):
                        training.write(save_samples(config, pipeline, training))
                        training.plot_curves(config.name)
                    if online_fid is not None and training.due(trainer.fid_every, "frechet"):
                        training.write(online_fid.measure(training.reporter.log))

                evaluate_if_due()  # after a kill between a checkpoint and its evaluation
                for batches in training.timing(loader):
                    training.record(state.train_step(batches, loss_of, config.seed), batches)
                    training.save_if_due()
                    training.exit_if_signalled()
                    evaluate_if_due()
        return summarize(config, run_dir, world.is_main)


def save_samples(config: TrainGenConfig, pipeline: DiffusionPipeline, training: TrainingRun) -> dict[str, int]:
    """Sample on rank 0 and save a grid with a column per class; a sample that is not finite is black.

    Returns:
        The number of samples and the NFE of each.
    """
    if not training.world.is_main:
        return {}
    pipeline.model.eval()
    labels = torch.arange(config.sampled_classes, device=training.world.device).repeat(config.samples_per_class)
    training.reporter.log(f"sampling {len(labels)} images")
    samples = sample_latents(
        pipeline.model, pipeline.objective, config.sampler, labels, range(len(labels)), config.seed, pipeline.shape
    )
    images = pipeline.autoencoder.decode(samples.x)
    finite = torch.isfinite(images).flatten(1).all(dim=1)
    if failed := int((~finite).sum()):
        training.reporter.log(f"warning: {failed} of {len(labels)} samples are NaN or infinite")
    pixels = to_uint8(images.where(finite[:, None, None, None], -1.0))
    file = training.run_dir.path / "samples" / f"step_{training.state.step:08d}.png"
    with training.reporter.expendable(file.parent):
        save_image_grid(pixels, file, columns=config.sampled_classes, zoom=max(1, 48 // pixels.shape[2]))
        training.reporter.picture(training.state.step, "sample_grid", file)
    return {"samples": len(labels), "nfe": samples.nfe}


def summarize(config: TrainGenConfig, run_dir: RunDirectory, verbose: bool) -> dict[str, float]:
    """Print the last loss and return it."""
    losses = [record["loss"] for record in run_dir.records() if record.get("loss") is not None]
    result = {"loss": losses[-1]} if losses else {}
    if verbose and result:
        loss = f"loss {result['loss']:.4f}"
        print(f"{config.out_dir}/{config.name}: {loss}, samples in {run_dir.path}/samples/", flush=True)
    return result


if __name__ == "__main__":
    register_configs()
    command_line("train_gen", run)
