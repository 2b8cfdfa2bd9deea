"""Sample from a trained generator.

    python sample.py run=outputs/RUN out=samples/RUN count=64 sampler=ddim sampler.cfg_scale=1.5 grid=true
    torchrun --nproc_per_node=8 sample.py run=outputs/RUN out=samples/RUN protocol=dit_table npz=true
    python sample.py checkpoint=DiT-XL-2-256x256.pt model=dit_xl_2 attention=softmax objective=diffusion \\
        autoencoder=sd_vae labels=[207,360,387,974] count=4 sampler.cfg_scale=4.0 grid=true out=samples/dit_xl_2

Sample i depends only on `seed` and i, for any world size; rerunning the command resumes an interrupted folder. On CPUs
samples are computed one by one, on one thread per rank, and on GPUs in fixed blocks of `batch_size`, so that rounding
does not depend on batching or threads.
"""

from pathlib import Path
from typing import Any

from models import GENERATORS, build_model
from vca.cli import command_line
from vca.config import SampleConfig, generator_groups, load_generated_images, register_schemas
from vca.generation.sample_folder import SampleFolder
from vca.runtime import distributed
from vca.runtime.metrics_log import progress_bar
from vca.runtime.rundir import check_ranks_agree


def register_configs() -> None:
    register_schemas(root={"sample": SampleConfig}, groups=generator_groups(GENERATORS))


def run(config: SampleConfig) -> dict[str, Any]:
    """Sample the missing images of the folder, and return the `result` of its manifest."""
    with distributed.start(config.device.value, distributed.COLLECTIVE_TIMEOUT_MINUTES, key="device") as world:
        check_ranks_agree(world, config)
        images, settings = load_generated_images(config, GENERATORS, build_model, world, config.count)
        size = images.compute_batch_size
        folder = SampleFolder(Path(config.out))
        blocks = world.from_main(lambda: folder.open(settings, config.count, size))
        with folder.writing() as writer, progress_bar(len(blocks) * size, "sample", world.is_main) as bar:
            for block in blocks[world.rank :: world.size]:
                samples = zip(block, images.sample(block), strict=True)
                writer.write((number, sample) for number, sample in samples if number < config.count)
                bar.update(min(size * world.size, bar.total - bar.n))
        world.barrier()
        result = world.from_main(lambda: folder.finish(config.count, config.npz, config.grid))
        if world.is_main:
            nfe, origin = result["nfe"]["mean"], settings["origin"]
            weights = "" if origin["step"] is None else f"{origin['weights']} weights of step {origin['step']}, "
            print(f"{config.out}: {config.count} samples, {weights}{nfe:g} NFE each, sha256 {result['sha256'][:12]}")
        return result


if __name__ == "__main__":
    register_configs()
    command_line("sample", run)
