"""The whole retriever on a GPU: bf16 near the CPU's fp32, every parameter with a finite gradient, no hidden synchronisation."""

import pytest
import torch

from gbla_kernels import Backend, JaggedLayout
from gbla_kernels.testing.error_budget import relative_error
from gbla_rec.config import DecoderConfig, EmbeddingConfig, EncoderConfig, ModelConfig
from gbla_rec.models.losses import semantic_id_nll
from gbla_rec.models.retriever import HistoryModel

WIDTHS = (16, 16, 8)
LENGTHS, TARGETS = [0, 3, 200, 1], [2, 1, 4, 0]


class Rows:
    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    def values(self) -> torch.Tensor:
        return self._values


@pytest.mark.gpu
def test_bf16_on_gpu_is_near_fp32_on_cpu_without_synchronisation() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        embedding=EmbeddingConfig(dim=32, semantic_code_dim=8),
        encoder=EncoderConfig(model_dim=64, num_heads=4, pattern="SGG"),
        decoder=DecoderConfig(num_heads=4),
    )
    codes = torch.stack([torch.randint(0, width, (50,)) for width in WIDTHS], dim=1)
    features = ["item_hash_0", "item_hash_1"]
    embedded = {name: torch.randn(sum(LENGTHS), 32) / 32**0.5 for name in features}
    items, targets = torch.randint(0, 50, (sum(LENGTHS),)), torch.randint(0, 50, (sum(TARGETS),))
    layout = JaggedLayout.from_lengths(LENGTHS)
    code_layout = JaggedLayout.from_lengths([len(WIDTHS) * count for count in TARGETS])
    model = HistoryModel(config, features, codes, WIDTHS, Backend.REFERENCE)

    def nll(device: str) -> torch.Tensor:
        on_device = model.to(device)
        rows = {name: Rows(values.to(device)) for name, values in embedded.items()}
        item, target = items.to(device), targets.to(device)
        row_layout, target_layout = layout.to(device), code_layout.to(device)
        torch.cuda.synchronize()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                memory = on_device.encode(rows, item, row_layout).memory
                target_codes = on_device.item_codes[target]
                losses = semantic_id_nll(on_device.decoder(target_codes, target_layout, memory), target_codes)
            losses.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        return losses.detach()

    exact = nll("cpu")
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert relative_error(nll("cuda").cpu(), exact) < 0.01
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert relative_error(parameter.grad.cpu(), gradients[name]) < 0.1, name
