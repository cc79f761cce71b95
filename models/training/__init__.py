"""Training: what ``sr-kernels train`` runs; docs/training.md shows it.

``Config`` says what a run is, ``Trainer`` does it, ``export_weights`` makes a file to ship of it.
"""

from .config import CONFIGS, Config, ConfigError, load_config
from .export import export_weights
from .loop import Trainer, TrainingError

__all__ = [
    "CONFIGS",
    "Config",
    "ConfigError",
    "Trainer",
    "TrainingError",
    "export_weights",
    "load_config",
]
