"""Check a data set before training on it: its folders, its classes, its image files.

    python scripts/doctor.py data=imagefolder data.root=/data/imagenet
    python scripts/doctor.py data.root=/data/imagenet data.check_seconds=3600      every file of a large set

Prints a line for each thing found, with the file and the remedy. Exit code 0 if a training can use all that was read, 2
if not. A training makes the same check at its start, for `data.check_seconds` of its own config.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from vca.config import DoctorConfig, command_line, register_schemas
from vca.data import load_dataset
from vca.data.config import DataConfig
from vca.data.doctor import examine, image_files
from vca.runtime.errors import ConfigError

register_schemas(root={"doctor": DoctorConfig}, groups={})


def run(config: DoctorConfig) -> None:
    """Examine both splits and print what was found; `ConfigError` if a training cannot use them."""
    problems, files = examine_folders(config.data)
    for problem in problems:
        print(f"error: {problem}")
    result = examine(files, config.data.check_seconds)
    for finding in result.findings:
        print(f"{'error' if finding.fatal else 'note'}: {finding}")
    print(result)
    if errors := len(problems) + len(result.errors):
        raise ConfigError(f"data.root={config.data.root}: {errors} error{'s' if errors > 1 else ''}")


def examine_folders(data: DataConfig) -> tuple[list[str], list[str]]:
    """What is wrong with the folders, and the image files: those of the data set, or if it is none, all there are."""
    datasets, problems = [], []
    for split in ("train", "val"):
        try:
            datasets.append(load_dataset(data, train=split == "train"))
        except ConfigError as error:
            problems.append(str(error))
    if not problems:
        print(f"{data.name}: {len(datasets[0])} training and {len(datasets[1])} evaluation images")
        return [], image_files(datasets)

    from torchvision.datasets.folder import IMG_EXTENSIONS

    folders = [Path(data.root or "") / split for split in ("train", "val")] if data.root else []
    files = (path for folder in folders for path in folder.rglob("*"))
    return list(dict.fromkeys(problems)), [str(path) for path in files if path.suffix.lower() in IMG_EXTENSIONS]


if __name__ == "__main__":
    command_line("doctor", run)
