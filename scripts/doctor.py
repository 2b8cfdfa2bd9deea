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
from vca.data.doctor import Examination, examine
from vca.runtime.errors import ConfigError

register_schemas(root={"doctor": DoctorConfig}, groups={})


def run(config: DoctorConfig) -> Examination:
    """Examine both splits and print what was found."""
    datasets = [load_dataset(config.data, train) for train in (True, False)]
    print(f"{config.data.name}: {len(datasets[0])} training and {len(datasets[1])} evaluation images")
    result = examine(datasets, config.data.check_seconds)
    for finding in result.findings:
        print(f"{'error' if finding.fatal else 'note'}: {finding}")
    print(result)
    if result.errors:
        raise ConfigError(f"data.root={config.data.root}: {len(result.errors)} files that a training cannot use")
    return result


if __name__ == "__main__":
    command_line("doctor", run)
