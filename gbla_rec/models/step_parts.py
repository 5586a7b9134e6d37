"""Named ranges of a training step, for profiles."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function


def step_part(name: str) -> AbstractContextManager[object]:
    """A range called ``name`` in a profile; compilers, which would break their graph, see nothing."""
    return nullcontext() if torch.compiler.is_compiling() else record_function(name)
