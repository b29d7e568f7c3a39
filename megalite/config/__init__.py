"""Typed, frozen configuration: the schema, reading it from TOML and the command line, and refusing what cannot work."""

from megalite.config.check import check
from megalite.config.load import CommandLine, build_config, load_config, parse_command_line, to_toml
from megalite.config.model import ModelConfig
from megalite.config.schema import (
    AdapterConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    KernelsConfig,
    LogConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RecoveryConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "AdapterConfig",
    "CheckpointConfig",
    "CommandLine",
    "Config",
    "DataConfig",
    "EvalConfig",
    "KernelsConfig",
    "LogConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RecoveryConfig",
    "RunConfig",
    "TrainConfig",
    "build_config",
    "check",
    "load_config",
    "parse_command_line",
    "to_toml",
]
