"""AdamW with warm-up, cosine decay and clipping for the dense part; the tables step inside backward on their own."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gbla_rec.config import OptimizerConfig


def learning_rate_at(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of the dense part at ``step`` (0 is the first): linear warm-up, then cosine to the final fraction."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1))
    low = config.final_learning_rate_fraction
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


class DenseOptimizer:
    """What TorchRec's train pipeline needs of an optimiser: ``zero_grad`` and ``step``; a step clips and schedules first."""

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, num_steps: int) -> None:
        """Matrices decay, vectors (norms, biases, gates) do not."""
        self.config, self.num_steps, self.steps_done = config, num_steps, 0
        self.parameters = dict(named_parameters)
        matrices = [parameter for parameter in self.parameters.values() if parameter.dim() > 1]
        vectors = [parameter for parameter in self.parameters.values() if parameter.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        # fused, on a CPU too: it alone can skip a step on the device
        self.adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
        self.gradient_norm = torch.zeros(())

    def skip_when(self, is_bad: Tensor) -> None:
        """While ``is_bad`` (fp32 scalar on the parameters' device) is 1, a step changes no weight and no moment; read on the device."""
        # the field through which torch.amp.GradScaler has a fused optimiser skip a step
        self.adamw.found_inf = is_bad  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.adamw.zero_grad(set_to_none)

    def step(self, closure: None = None) -> None:
        """Clip the global norm of the dense gradients, set the learning rate, update."""
        self.gradient_norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip_grad_norm)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate_at(self.steps_done, self.num_steps, self.config)
        self.adamw.step()
        self.steps_done += 1

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name; zeros before the first step. ``load_state_tensors`` takes them back."""
        state = {}
        for name, parameter in self.parameters.items():
            moments = self.adamw.state[parameter]
            state[f"{name}.exp_avg"] = moments.get("exp_avg", torch.zeros_like(parameter))
            state[f"{name}.exp_avg_sq"] = moments.get("exp_avg_sq", torch.zeros_like(parameter))
            state[f"{name}.step"] = moments.get("step", torch.zeros((), device=parameter.device))
        return state

    def load_state_tensors(self, state: dict[str, Tensor], steps_done: int) -> None:
        """Continue from saved moments; the learning rate follows from ``steps_done``."""
        for name, parameter in self.parameters.items():
            self.adamw.state[parameter] = {field: state[f"{name}.{field}"] for field in ("step", "exp_avg", "exp_avg_sq")}
        self.steps_done = steps_done
