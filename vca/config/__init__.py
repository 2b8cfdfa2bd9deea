"""Configs: the schema of each root script, and the strict way from YAML and overrides to dataclasses."""

from vca.config.generator import check_protocol, drawn_set, read_generator
from vca.config.load import (
    command_line,
    compose,
    from_plain,
    from_registry,
    mistakes_in_one_line,
    read_protocol,
    register_schemas,
)
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
    "command_line",
    "compose",
    "drawn_set",
    "from_plain",
    "from_registry",
    "mistakes_in_one_line",
    "read_generator",
    "read_protocol",
    "register_schemas",
]
