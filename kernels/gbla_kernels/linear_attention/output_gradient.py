"""From the gradient of the output to those of ``u = phi(q) S`` and ``c = phi(q) . n``."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# V value width, B? block (docs/shapes.md)

import triton
import triton.language as tl

from gbla_kernels.elementwise import sigmoid
from gbla_kernels.linear_attention.output import normalized


@triton.jit
def output_gradient(
    u,
    c,
    d_y,
    z,
    norm_weight,
    p_d_z,
    m_d_z,
    eps,
    V: tl.constexpr,
    HAS_OUTPUT_GATE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Gradients of u ``(BT, BV)`` and c ``(BT,)``, and what a token adds to that of norm_weight ``(BT, BV)``, all fp32.

    That of z is written to the pointers ``p_d_z (BT, BV)`` under the mask ``m_d_z``. Without an output gate z and both are not used.
    """
    factor = normalized(u, c, eps, V, NORMALIZE, HAS_NORM)
    normed = u * factor[:, None]
    weighted = d_y * norm_weight[None, :] if HAS_NORM else d_y
    if HAS_OUTPUT_GATE:
        gate = sigmoid(z)
        silu = z * gate
        d_z = weighted * normed * (gate + silu - silu * gate)
        tl.store(p_d_z, d_z.to(p_d_z.dtype.element_ty), mask=m_d_z)
        d_y = d_y * silu
        d_normed = weighted * silu
    else:
        d_normed = weighted
    weight_share = d_y * normed
    d_c = c * 0.0
    if HAS_NORM or NORMALIZE:
        # with the factor inside: its square and cube leave the range of fp32 where u is small
        along = tl.sum(d_normed * normed, axis=1)
    if HAS_NORM:
        d_u = (d_normed - normed * (along / V)[:, None]) * factor[:, None]
        if NORMALIZE:
            scaled = factor * c
            d_c = -(scaled * tl.cast(eps, tl.float32)) * (factor * along)
    elif NORMALIZE:
        d_u = d_normed * factor[:, None]
        d_c = -factor * along
    else:
        d_u = d_normed
    return d_u, d_c, weight_share
