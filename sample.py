"""Draw samples from a trained generator.

    python sample.py run=outputs/RUN out=samples/RUN count=64 sampler=ddim sampler.cfg_scale=1.5 grid=true
    torchrun --nproc_per_node=8 sample.py run=outputs/RUN out=samples/RUN protocol=dit_table npz=true
    python sample.py checkpoint=DiT-XL-2-256x256.pt model=dit_xl_2 attention=softmax objective=diffusion \\
        autoencoder=sd_vae labels=[207,360,387,974] count=4 sampler.cfg_scale=4.0 grid=true out=samples/dit_xl_2

Sample i of a set follows from `seed` and i alone, on any number of ranks; the same command goes on where it was
interrupted. On CPUs samples are computed one by one, on one thread a rank, so that neither batch size nor threads
decide how something rounds; a GPU computes `batch_size` at once, always the same ones.
"""

from pathlib import Path
from typing import Any

from models import GENERATORS, build_model
from vca.attention import ATTENTIONS
from vca.cli import command_line
from vca.config import SampleConfig, check_protocol, drawn_set, read_generator, register_schemas
from vca.generation.autoencoder import AUTOENCODERS
from vca.generation.objective import OBJECTIVES
from vca.generation.sample_folder import SampleFolder
from vca.runtime import distributed
from vca.runtime.metrics_log import progress_bar
from vca.runtime.rundir import check_ranks_agree
from vca.training.restore import load_generator

DAY = 24 * 60.0  # minutes that ranks wait for each other: the slowest has the last word


def register_configs() -> None:
    """Register the config schemas of this script with Hydra."""
    register_schemas(
        root={"sample": SampleConfig},
        groups={
            "model": GENERATORS,
            "attention": ATTENTIONS,
            "objective": OBJECTIVES,
            "autoencoder": AUTOENCODERS,
        },
    )


def run(config: SampleConfig) -> dict[str, Any]:
    """Draw what is missing of the set, and return the `result` of its manifest."""
    with distributed.start(config.device.value, DAY, key="device") as world:
        check_ranks_agree(world, config)
        configs = read_generator(config, GENERATORS)
        generator = load_generator(
            configs, build_model, world, config.weights, config.run, config.step, config.checkpoint
        )
        check_protocol(config, generator.origin)
        drawn = drawn_set(config, generator, config.count)
        samples = SampleFolder(Path(config.out))
        manifest = {"protocol": config.protocol, **drawn.describe()}
        blocks = world.from_main(lambda: samples.open(manifest, config.count, drawn.compute_batch_size))
        with progress_bar(len(blocks) * drawn.compute_batch_size, "sample", world.is_main) as bar:
            for block in blocks[world.rank :: world.size]:
                for number, sample in zip(block, drawn.draw(block), strict=True):
                    if number < config.count:
                        samples.write(number, sample)
                bar.update(min(drawn.compute_batch_size * world.size, bar.total - bar.n))
        world.barrier()
        result = world.from_main(lambda: samples.finish(config.count, config.npz, config.grid))
        if world.is_main:
            mean = result["nfe"]["mean"]
            print(f"{config.out}: {config.count} samples, {mean:g} evaluations each, sha256 {result['sha256'][:12]}")
        return result


if __name__ == "__main__":
    register_configs()
    command_line("sample", run)
