"""Which implementation of an op runs: always the caller's choice, never a silent fallback."""

import enum


class Backend(enum.Enum):
    """Implementation of an op.

    ``REFERENCE`` is plain PyTorch: exact, differentiable, runs anywhere, also in fp64.
    ``TRITON`` is the fused GPU kernel; where it does not exist for an argument it raises ``NotImplementedError``.
    """

    REFERENCE = "reference"
    TRITON = "triton"
