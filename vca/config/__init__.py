"""Config schemas (dataclasses) of the scripts, and `compose`, which fills them from YAML files and overrides."""

from vca.config.composition import compose, from_plain, from_registry, read_protocol, register_schemas
from vca.config.pipeline import generator_groups, load_generated_images
from vca.config.schema import (
    DoctorConfig,
    EvalFidConfig,
    PrepareImagesConfig,
    PrepareLatentsConfig,
    ReferenceStatsConfig,
    SampleConfig,
    TrainClsConfig,
    TrainGenConfig,
)

__all__ = [
    "DoctorConfig",
    "EvalFidConfig",
    "PrepareImagesConfig",
    "PrepareLatentsConfig",
    "ReferenceStatsConfig",
    "SampleConfig",
    "TrainClsConfig",
    "TrainGenConfig",
    "compose",
    "from_plain",
    "from_registry",
    "generator_groups",
    "load_generated_images",
    "read_protocol",
    "register_schemas",
]
