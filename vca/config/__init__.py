"""Configs: the schema of each root script, and the strict way from YAML and overrides to dataclasses."""

from vca.config.load import command_line, compose, register_schemas
from vca.config.schema import DoctorConfig, TrainClsConfig, TrainGenConfig

__all__ = ["DoctorConfig", "TrainClsConfig", "TrainGenConfig", "command_line", "compose", "register_schemas"]
