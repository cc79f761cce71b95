"""The integers by which options travel through the operators' schemas.

The same numbers stand in csrc/common/activation.h and csrc/common/shift_pattern.h.
"""

ACTIVATIONS: dict[str | None, int] = {None: 0, "relu": 1, "leaky_relu": 2, "gelu": 3, "silu": 4}
PATTERNS: dict[str, int] = {"plus": 0, "cross": 1, "none": 2}
STATISTICS: dict[str, int] = {"mean": 0, "contrast": 1}
