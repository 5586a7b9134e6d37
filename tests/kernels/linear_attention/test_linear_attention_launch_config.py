"""The table of launch parameters: every width has slices of the state that cover its keys."""

import pytest
import torch

from gbla_kernels.linear_attention import launch_config as module
from gbla_kernels.linear_attention.launch_config import MAX_WIDTH, launch_config

WIDTHS = (1, 16, 17, 32, 33, 64, 65, 96, 128, 129, 200, MAX_WIDTH)


@pytest.mark.parametrize("for_hopper", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_slices_cover_all_keys_and_none_is_empty(dtype: torch.dtype, for_hopper: bool) -> None:
    for key_dim in WIDTHS:
        for value_dim in WIDTHS:
            config = launch_config(key_dim, value_dim, dtype, for_hopper)
            assert (config.num_key_blocks - 1) * config.key_block < key_dim <= config.num_key_blocks * config.key_block
            assert config.key_block.bit_count() == config.value_block.bit_count() == 1 and config.value_block >= value_dim


@pytest.mark.parametrize(
    ("dtype", "value_dim", "widest"),
    [
        (torch.bfloat16, 128, 128),
        (torch.bfloat16, 129, 64),
        (torch.float16, 128, 64),
        (torch.float16, 129, 32),
        (torch.float32, 128, 64),
        (torch.float32, 129, 32),
    ],
)
def test_the_widest_keys_whose_state_one_program_holds(dtype: torch.dtype, value_dim: int, widest: int) -> None:
    whole = [key_dim for key_dim in range(1, MAX_WIDTH + 1) if launch_config(key_dim, value_dim, dtype).num_key_blocks == 1]
    assert whole == list(range(1, widest + 1))


def test_only_bf16_on_hopper_has_limits_on_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    # the interpreter has a table of its own
    monkeypatch.setattr(module, "INTERPRETED", False)
    uncached = launch_config.__wrapped__

    def limited(dtype: torch.dtype, for_hopper: bool) -> bool:
        config = uncached(64, 64, dtype, for_hopper)
        kernels = (config.state_for_backward, config.row, *config.tiny_rows, *config.tiny_rows_backward, config.query_backward)
        return any(kernel.max_registers is not None for kernel in kernels)

    found = {(dtype, for_hopper): limited(dtype, for_hopper) for dtype in (torch.bfloat16, torch.float32) for for_hopper in (True, False)}
    assert [case for case, is_limited in found.items() if is_limited] == [(torch.bfloat16, True)]
