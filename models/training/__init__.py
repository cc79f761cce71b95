"""Training: what ``sr-kernels train`` runs; docs/training.md shows it.

``Config`` says what a run is, ``Trainer`` does it, ``export_weights`` makes a file to ship of it.
``pack`` makes one file of training images.
"""

from .config import CONFIGS, Config, ConfigError, load_config
from .export import export_weights
from .loop import Trainer, TrainingError
from .packed import PackedFileError
from .packing import pack

__all__ = [
    "CONFIGS",
    "Config",
    "ConfigError",
    "PackedFileError",
    "Trainer",
    "TrainingError",
    "export_weights",
    "load_config",
    "pack",
]
