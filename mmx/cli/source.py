"""What a command line names: a checkpoint folder or a preset."""

from pathlib import Path

from mmx.config import PRESETS, ModelConfig, preset


def config_of(name: str) -> ModelConfig:
    """The config of a preset, or of the checkpoint folder at this path.

    Raises:
      ValueError: it is neither.
    """
    if name in PRESETS:
        return preset(name)
    if not Path(name).is_dir():
        raise ValueError(f"{name}: neither a folder nor a preset ({', '.join(PRESETS)})")
    from mmx.convert.load import load_config

    return load_config(name)
