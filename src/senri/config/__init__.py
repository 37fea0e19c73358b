"""Configuration: three YAML files in, validated objects out. Loads neither torch nor transformers."""

from senri.config.manager import ConfigError, ConfigManager
from senri.config.schema import ExperimentConfig, ModelConfig, SenriOverrides, TrainingConfig

__all__ = [
    "ConfigError",
    "ConfigManager",
    "ExperimentConfig",
    "ModelConfig",
    "SenriOverrides",
    "TrainingConfig",
]
