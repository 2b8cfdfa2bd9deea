"""Train an image classifier.

    python train_cls.py                                                     a small VCA DeiT on handwritten digits
    python train_cls.py attention=softmax                                   the baseline
    torchrun --nproc_per_node=8 train_cls.py experiment=table1/deit_tiny_vca data.root=/data/imagenet
    python train_cls.py model=pvt_tiny attention=softmax data=imagenet data.root=/data/imagenet \\
        trainer.init_from=pvt_tiny.pth trainer.eval_only=true               evaluate a published checkpoint

The same command continues a run that was interrupted, to the bit. `--cfg job --resolve` prints the whole config.
"""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from models import CLASSIFIERS, build_model
from vca.attention import ATTENTIONS, backend_of
from vca.cli import command_line
from vca.config import TrainClsConfig, register_schemas
from vca.data import identify_files, load_dataset
from vca.data.augment import BatchMixer, eval_transform, train_transform
from vca.data.doctor import check_before_training
from vca.data.loader import MicroBatches, TrainOrder, eval_loader, train_loader
from vca.evaluation.accuracy import evaluate
from vca.runtime import distributed
from vca.runtime.compute import set_precision
from vca.runtime.errors import ConfigError, check, config_errors
from vca.runtime.rundir import RunDirectory, check_ranks_agree, to_dict
from vca.runtime.seeding import seed_torch
from vca.training.checkpoint import list_checkpoints
from vca.training.classification import ClassificationLoss
from vca.training.pretrained import LoadReport, init_from
from vca.training.run import TrainingRun
from vca.training.step import TrainState


def register_configs() -> None:
    """Register the config schemas of this script with Hydra."""
    register_schemas(
        root={"train_cls": TrainClsConfig},
        groups={
            "model": CLASSIFIERS,
            "attention": ATTENTIONS,
        },
    )


def run(config: TrainClsConfig) -> dict[str, float]:
    """Train, or go on training, and return the last evaluation: `val/top1`, with EMA also `ema/top1`, ..."""
    trainer = config.trainer
    with distributed.start(trainer.device.value, trainer.timeout_minutes) as world:
        check_ranks_agree(world, config)
        set_precision(trainer.precision, trainer.deterministic)
        folder = RunDirectory(Path(config.out_dir) / config.name)
        micro_batch_size, accumulation = trainer.micro_batch_on(world.size)
        if config.augment.mixes:
            key = "trainer.micro_batch_size (if null, trainer.global_batch_size / ranks)"
            check(
                micro_batch_size % 2 == 0, key, "even for Mixup and CutMix, which mix images in pairs", micro_batch_size
            )

        val_images, images = load_dataset(config.data, train=False), load_dataset(config.data, train=True)
        # An evaluation may look at other images than the run was trained on.
        files = {} if trainer.eval_only else identify_files(world, train=images, val=val_images)
        record = {**to_dict(config), **files}
        folder.check(record)
        seed_torch(config.seed, "model")
        with config_errors():
            model = build_model(config.model, config.attention)
            attention = config.attention.name + backend_of(model, world.device, trainer.precision.compute_dtype)
            model.set_grad_checkpointing(trainer.grad_checkpointing)
        transform = train_transform(config.augment, config.data)
        val_batches = eval_loader(
            val_images, eval_transform(config.data), world, trainer.eval_batch_size, trainer.workers
        )
        order = TrainOrder(len(images), trainer.global_batch_size, config.seed, config.augment.aug_repeats)
        load_report = None
        if trainer.init_from is not None and not world.broadcast(list_checkpoints(folder.checkpoints)):
            load_report = init_from(model, Path(trainer.init_from), trainer.init_weights)
        state = TrainState(model, trainer, config.optim, world, order.steps_per_epoch)

        training = TrainingRun(folder, state, trainer, world)
        resumed = training.resume()
        if trainer.eval_only or (training.finished and "val/top1" in training.reported):
            if resumed:
                training.draw(config.name)
            else:
                check_complete(load_report, folder)
                state.ema = None  # a copy of what was read
            return summarize(config, evaluate_weights(state, val_batches), world.is_main)
        batch_bytes = micro_batch_size * config.data.image_bytes
        check_before_training(config.data, [images, val_images], trainer.workers, batch_bytes, world)

        with training.open(config.name, record, config.wandb):
            data = f"{config.data.name}: {len(images)} training and {len(val_images)} evaluation images"
            training.log_setup(config.name, f"{config.model.name} with {attention}", data)
            if load_report is not None:
                training.reporter.log(f"starting from {trainer.init_from}\n{load_report}")
            loss_of = ClassificationLoss(BatchMixer(config.augment, config.data.num_classes, config.seed))
            shares = MicroBatches(order, world, micro_batch_size, accumulation, state.step, state.total_steps)
            loader = train_loader(images, transform, config.seed, shares, trainer.workers)
            result: dict[str, float] = {}

            def evaluate_if_due() -> None:
                nonlocal result
                if training.due(trainer.eval_every, "val/top1"):
                    training.reporter.log(f"evaluating {len(val_images)} images")
                    training.write(result := evaluate_weights(state, val_batches))

            evaluate_if_due()  # if a kill came between checkpoint and evaluation
            for batches in training.timing(loader):
                update = state.train_step([batch.to(world.device) for batch in batches], loss_of, config.seed)
                training.record(update, batches)
                if training.due(trainer.checkpoint_every):
                    training.save()
                training.exit_if_signalled()
                evaluate_if_due()
        training.draw(config.name)
        return summarize(config, result, world.is_main)


def check_complete(load_report: LoadReport | None, folder: RunDirectory) -> None:
    """Raise `ConfigError` unless there is something to evaluate: the weights of a file, all of them and no others."""
    if load_report is None:
        raise ConfigError(f"trainer.eval_only=true needs a checkpoint in {folder.checkpoints}, or trainer.init_from")
    load_report.check_complete("trainer.eval_only=true needs a trainer.init_from")


def evaluate_weights(state: TrainState, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Evaluate the raw weights as `val/...` and, where there is an average, the EMA as `ema/...`."""
    models = {"val": state.model} | ({"ema": state.ema.module} if state.ema is not None else {})
    results = {prefix: evaluate(model, batches, state.world, state.autocast) for prefix, model in models.items()}
    return {f"{prefix}/{key}": value for prefix, result in results.items() for key, value in result.items()}


def summarize(config: TrainClsConfig, result: dict[str, float], talk: bool) -> dict[str, float]:
    """Print the final evaluation and return it."""
    if talk:
        raw = f"top-1 {result['val/top1']:.2f} % of {result['val/images']} images"
        ema = f", EMA weights {result['ema/top1']:.2f} %" if "ema/top1" in result else ""
        print(f"{config.out_dir}/{config.name}: {raw}{ema}", flush=True)
    return result


if __name__ == "__main__":
    register_configs()
    command_line("train_cls", run)
