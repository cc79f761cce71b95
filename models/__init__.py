"""Networks that run on the operators of :mod:`sr_kernels`, and their weights.

``elan``, ``elan_light`` and ``mafdn`` build a network; ``load_checkpoint`` builds the one that a
file of weights is for; ``load_pretrained`` loads weights that come with the package. Every
network has ``scale``, ``rgb_range`` (the value of white in input and output), ``backend``,
``tile_multiple`` and ``tile_overlap``. ``plan`` makes a faster copy of one for inference.
"""

from .basicsr import register_basicsr
from .checkpoints import CheckpointError, UnknownNetworkError, load_checkpoint
from .do_conv import DOConv2d
from .elan import ELAN, elan, elan_light
from .mafdn import MAFDN, mafdn
from .plan import Plan, plan
from .pretrained import PRETRAINED, load_pretrained

__all__ = [
    "ELAN",
    "MAFDN",
    "PRETRAINED",
    "CheckpointError",
    "DOConv2d",
    "Plan",
    "UnknownNetworkError",
    "elan",
    "elan_light",
    "load_checkpoint",
    "load_pretrained",
    "mafdn",
    "plan",
    "register_basicsr",
]
