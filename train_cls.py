"""Train an image classifier.

    python train_cls.py                                                     a small VCA DeiT on handwritten digits
    python train_cls.py attention=softmax                                   the softmax baseline
    torchrun --nproc_per_node=8 train_cls.py experiment=table1/deit_tiny_vca data.root=/data/imagenet
    python train_cls.py model=pvt_tiny attention=softmax data=imagenet data.root=/data/imagenet \\
        trainer.init_from=pvt_tiny.pth trainer.eval_only=true               evaluate a published checkpoint

Rerun the same command to resume an interrupted run, bit-exactly. `--cfg job --resolve` prints the whole config.
"""

from functools import partial
from pathlib import Path

from models import CLASSIFIERS, build_model
from vca.attention import ATTENTIONS, backend_of
from vca.cli import command_line
from vca.config import TrainClsConfig, register_schemas
from vca.data import identify_files, load_dataset
from vca.data.augment import BatchMixer, Normalize, eval_transform, worker_transform
from vca.data.doctor import check_before_training
from vca.data.loader import MicroBatches, TrainOrder, eval_loader, image_inputs, train_loader
from vca.evaluation.complexity import count_macs
from vca.report.classifier import ClassifierEvaluation, summarize
from vca.runtime import distributed
from vca.runtime.compute import set_precision
from vca.runtime.errors import ConfigError, check, config_errors
from vca.runtime.rundir import RunDirectory, check_ranks_agree, to_dict
from vca.runtime.seeding import seed_torch
from vca.training.checkpoint import list_checkpoints
from vca.training.classification import ClassificationLoss
from vca.training.freeze import format_frozen, freeze_layers
from vca.training.pretrained import init_from
from vca.training.run import TrainingRun, log_on_main
from vca.training.step import TrainState


def register_configs() -> None:
    register_schemas(root={"train_cls": TrainClsConfig}, groups={"model": CLASSIFIERS, "attention": ATTENTIONS})


def run(config: TrainClsConfig) -> dict[str, float]:
    """Start or resume a run, and return its last evaluation: `val/top1`, with EMA also `ema/top1`, ..."""
    trainer = config.trainer
    with distributed.start(trainer.device.value, trainer.timeout_minutes) as world:
        check_ranks_agree(world, config)
        set_precision(trainer.precision, trainer.deterministic)
        run_dir = RunDirectory(Path(config.out_dir) / config.name)
        micro_batch_size, accumulation = trainer.micro_batch_on(world.size)
        if config.augment.mixes:
            key = "trainer.micro_batch_size (if null, trainer.global_batch_size / world size)"
            check(micro_batch_size % 2 == 0, key, "even for Mixup and CutMix, which mix pairs", micro_batch_size)

        log_on_main(world, f"{config.name}: loading data={config.data.name}")
        val_images, train_images = (load_dataset(config.data, train, world) for train in (False, True))
        # Other files are an error when a run is resumed, but an evaluation may use them.
        files = {} if trainer.eval_only else identify_files(train=train_images, val=val_images)
        record = {**to_dict(config), **files}
        run_dir.check(record)

        seed_torch(config.seed, "model")
        with config_errors():
            model = build_model(config.model, config.attention)
            attention = config.attention.name + backend_of(model, world.device, trainer.precision.compute_dtype)
            model.set_grad_checkpointing(trainer.grad_checkpointing)
        load_report = None
        if trainer.init_from is not None and not world.broadcast(list_checkpoints(run_dir.checkpoints)):
            load_report = init_from(model, Path(trainer.init_from), trainer.init_weights)

        frozen = freeze_layers(model, trainer.freeze_layers) if trainer.freeze_layers is not None else set()

        order = TrainOrder(len(train_images), trainer.global_batch_size, config.seed, config.augment.aug_repeats)
        state = TrainState(model, trainer, config.optim, world, order.steps_per_epoch)
        training = TrainingRun(run_dir, state, trainer, world)
        resumed = training.resume()
        transform = worker_transform(eval_transform(config.data))
        val_loader = eval_loader(val_images, transform, world, trainer.eval_batch_size, trainer.workers)
        evaluation = ClassifierEvaluation(
            config, training, val_images, val_loader, Normalize(config.data, world.device)
        )
        evaluating = f"evaluating {len(val_images)} images"
        if trainer.eval_snapshots:
            log_on_main(world, f"{evaluating} with each snapshot")
            return evaluation.evaluate_snapshots()
        if trainer.eval_only or (training.finished and "val/top1" in training.reported):
            if not resumed:
                if load_report is None:
                    raise ConfigError(
                        f"trainer.eval_only=true needs a checkpoint in {run_dir.checkpoints} or trainer.init_from"
                    )
                load_report.check_complete("trainer.eval_only=true needs a trainer.init_from")
                state.emas = []  # copies of the loaded weights
            log_on_main(world, evaluating)
            result = evaluation.evaluate()
            if resumed:
                evaluation.write_records(result)
                training.plot_curves(config.name)
            return summarize(run_dir.path, result, world.is_main)

        inputs = image_inputs(config.augment, config.data, config.seed, world.device)
        batch_bytes = micro_batch_size * inputs.item_bytes
        check_before_training(config.data, [train_images, val_images], trainer.workers, batch_bytes, world)
        with training.open(config.name, record, config.logger, config.wandb):
            data = f"{config.data.name}: {len(train_images)} training and {len(val_images)} evaluation images"
            # The FLOPs of a step are 6 per MAC only if all layers are trained.
            macs = partial(count_macs, build_model, config.model, config.attention) if not frozen else lambda: None
            training.log_setup(config.name, f"{config.model.name} with {attention}", data, macs)
            if load_report is not None:
                training.reporter.log(f"initialized from {trainer.init_from}\n{load_report}")
            if frozen:
                training.reporter.log(format_frozen(model, frozen, load_report.missing if load_report else ()))
            loss_of = ClassificationLoss(BatchMixer(config.augment, config.data.num_classes, config.seed))
            micro_batches = MicroBatches(order, world, micro_batch_size, accumulation, state.step, state.total_steps)
            loader = train_loader(train_images, inputs, config.seed, micro_batches, trainer.workers)
            result = {}

            def evaluate_if_due() -> None:
                if training.due(trainer.eval_every, "val/top1"):
                    training.reporter.log(evaluating)
                    result.update(evaluation.evaluate())
                    training.write(result)
                    if training.finished:
                        evaluation.write_records(result)

            evaluate_if_due()  # after a kill between a checkpoint and its evaluation
            for batches in training.timing(loader):
                training.record(state.train_step(batches, loss_of, config.seed), batches)
                training.save_if_due()
                training.exit_if_signalled()
                evaluate_if_due()
        training.plot_curves(config.name)
        return summarize(run_dir.path, result, world.is_main)


if __name__ == "__main__":
    register_configs()
    command_line("train_cls", run)
