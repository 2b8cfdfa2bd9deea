"""Config schemas of the scripts, and their strict composition from YAML files and overrides to dataclasses."""

from vca.config.composition import (
    compose,
    from_plain,
    from_registry,
    read_protocol,
    register_schemas,
)
from vca.config.pipeline import check_protocol, drawn_set, read_generator
from vca.config.schema import (
    DoctorConfig,
    EvalFidConfig,
    PrepareLatentsConfig,
    ReferenceStatsConfig,
    SampleConfig,
    TrainClsConfig,
    TrainGenConfig,
)

__all__ = [
    "DoctorConfig",
    "EvalFidConfig",
    "PrepareLatentsConfig",
    "ReferenceStatsConfig",
    "SampleConfig",
    "TrainClsConfig",
    "TrainGenConfig",
    "check_protocol",
    "compose",
    "drawn_set",
    "from_plain",
    "from_registry",
    "read_generator",
    "read_protocol",
    "register_schemas",
]
