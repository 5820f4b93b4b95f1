"""One YAML file, validated once, frozen.

`load_config` reads the file, applies ``--set key=value`` overrides and returns a `RunConfig`,
or raises one `ConfigError` that lists every problem. A field's own range is checked by its type
(`sections`); rules that span fields live in `rules`. Keys are Megatron's words where it has one.
All environment variables of the package (``BITCPM_*``) are read in `environment`.
"""

from megatron_bitcpm.config.environment import (
    env_cpu_isa,
    env_local_rank,
    env_platform,
    env_rank,
    env_world_size,
)
from megatron_bitcpm.config.load import load_config, parse_config
from megatron_bitcpm.config.sections import (
    BlendEntry,
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    OptimizerSettings,
    ParallelConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "BlendEntry",
    "CheckpointConfig",
    "DataConfig",
    "GuardConfig",
    "OptimizerSettings",
    "ParallelConfig",
    "QuantConfig",
    "RunConfig",
    "TrainConfig",
    "env_cpu_isa",
    "env_local_rank",
    "env_platform",
    "env_rank",
    "env_world_size",
    "load_config",
    "parse_config",
]
