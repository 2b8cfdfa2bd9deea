"""Configs: the schema of each root script, and the strict way from YAML and overrides to dataclasses."""

from vca.config.load import command_line, compose, from_plain, from_registry, read_protocol, register_schemas
from vca.config.schema import DoctorConfig, PrepareLatentsConfig, SampleConfig, TrainClsConfig, TrainGenConfig

__all__ = [
    "DoctorConfig",
    "PrepareLatentsConfig",
    "SampleConfig",
    "TrainClsConfig",
    "TrainGenConfig",
    "command_line",
    "compose",
    "from_plain",
    "from_registry",
    "read_protocol",
    "register_schemas",
]
