"""``ModelConfig.kernels``: what has no Triton kernel is refused when the config is made, or before the run reads or writes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from gbla_kernels.causal_conv1d.forward import MAX_TAPS
from gbla_kernels.cross_attention import launch_config as cross_attention
from gbla_kernels.linear_attention import launch_config as linear_attention
from gbla_kernels.rms_norm_causal_conv1d.forward import MAX_DIM
from gbla_rec.checkpoint import run_parts
from gbla_rec.config import DecoderConfig, EncoderConfig, ModelConfig
from gbla_rec.config.model import TRITON_MAX_CONV_WIDTH, TRITON_MAX_FUSED_NORM_DIM, TRITON_MAX_HEAD_DIM
from gbla_rec.recipes import recipe
from gbla_rec.training.trainer import train


def test_the_limits_are_those_of_the_kernels() -> None:
    assert TRITON_MAX_CONV_WIDTH == MAX_TAPS and TRITON_MAX_FUSED_NORM_DIM == MAX_DIM
    assert TRITON_MAX_HEAD_DIM == linear_attention.MAX_WIDTH == cross_attention.MAX_WIDTH


@pytest.mark.parametrize(
    ("encoder", "decoder", "obstacle"),
    [
        ({"direction": "causal"}, {}, "EncoderConfig.direction is 'causal'"),
        ({"conv_width": 9}, {}, "EncoderConfig.conv_width is 9"),
        ({"num_heads": 1}, {}, "model_dim / EncoderConfig.num_heads is 512"),
        ({}, {"num_heads": 1}, "model_dim / DecoderConfig.num_heads is 512"),
    ],
)
def test_a_setting_without_a_triton_kernel_is_refused_by_name(encoder: dict[str, Any], decoder: dict[str, Any], obstacle: str) -> None:
    parts = {"encoder": EncoderConfig(**encoder), "decoder": DecoderConfig(**decoder)}
    with pytest.raises(ValueError, match=rf"ModelConfig.kernels must be 'reference' where {obstacle}.*got 'triton'"):
        ModelConfig(**parts, kernels="triton")
    for kernels in ("auto", "reference"):
        assert ModelConfig(**parts, kernels=kernels).kernels_on("cuda") == "reference"


def test_layers_without_a_convolution_allow_any_width() -> None:
    for encoder in (EncoderConfig(pattern="S", conv_width=9), EncoderConfig(conv=False, conv_width=9)):
        assert ModelConfig(encoder=encoder, kernels="triton").kernels == "triton"


def test_triton_without_cuda_is_refused_before_anything_is_read_or_written(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_parts, "INTERPRETED", False)
    config = recipe("movielens_small")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, kernels="triton"))
    with pytest.raises(
        ValueError, match=r"ModelConfig.kernels must be 'auto' or 'reference' without a CUDA device, got 'triton' on cpu; run on"
    ):
        train(config, device=torch.device("cpu"))
    assert not workspace.exists()
