"""Gated MLPs of many experts with low-rank updates beside them: grouped GEMMs, no W + BA.

Mathematics. Token t goes to k experts e with routing weights w (Shazeer et al. 2017, arXiv
1701.06538), each a gated MLP as in `lora_mlp`:
    [g | u] = x W1_e^T + s1 (x A1_e^T) B1_e        a = act(g) * u
    y_t = sum over its experts of  (w a) W2_e^T + s2 ((w a) A2_e^T) B2_e
The routing weight is put on `a`, before the last product, which is linear: so its gradient is
sum(da * a) and the product's result need not be kept. Saved are x, [g | u] and the low-rank
results; rows sorted by expert and `a` are made again, as in `lora_mlp`.

Ranks that are no multiple of 8 are filled up with zeros: torch's grouped product wants rows of a
multiple of 16 bytes, and the low-rank results have a row of r elements.

PEFT folds W + BA for every expert in each forward pass; here the low-rank products of a token's own
experts alone are made.

Shape legend: T tokens, k experts a token, S = T k rows sorted by expert, E experts, H hidden size,
F width of an expert, r rank.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regrow.kernels import swiglu

logger = logging.getLogger(__name__)

_ALIGNMENT = 16  # bytes, of torch's grouped product
_RANK_MULTIPLE = 8  # elements of 16 bits in that


@dataclass(frozen=True)
class ExpertProjection:
    """One linear layer of every expert: y = x W_e^T + scaling (x A_e^T) B_e."""

    weight: Tensor  # [E, O, I]
    a: Tensor | None = None  # [E, r, I]
    b: Tensor | None = None  # [E, r, O]
    scaling: float = 1.0


# ---- reference ----


def reference(
    x_TH: Tensor,
    index_Tk: Tensor,
    weights_Tk: Tensor,
    gate_up: ExpertProjection,
    down: ExpertProjection,
    activation: str = "silu",
) -> Tensor:
    """By the formula, one expert after the other."""
    out_TH = torch.zeros_like(x_TH)
    for expert in range(gate_up.weight.shape[0]):
        token, choice = (index_Tk == expert).nonzero(as_tuple=True)
        gate, up = _one(x_TH[token], gate_up, expert).chunk(2, dim=-1)
        y = _one(swiglu.reference(gate, up, activation), down, expert)
        out_TH = out_TH.index_add(0, token, y * weights_Tk[token, choice, None].to(y.dtype))
    return out_TH


def _one(x: Tensor, projection: ExpertProjection, expert: int) -> Tensor:
    y = x @ projection.weight[expert].t()
    if projection.a is None or projection.b is None:
        return y
    return y + projection.scaling * (x @ projection.a[expert].t()) @ projection.b[expert]


# ---- host ----


def _grouped(x_SI: Tensor, w_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """[S, O]: the rows of each expert times its matrix."""
    if _has_grouped(x_SI, w_EIO):
        return _grouped_mm(x_SI, w_EIO, ends_E)
    out_SO = x_SI.new_zeros(len(x_SI), w_EIO.shape[2])
    for expert, rows in enumerate(_slices(ends_E)):
        out_SO[rows] = x_SI[rows] @ w_EIO[expert]
    return out_SO


def _grouped_gradient(x_SI: Tensor, dy_SO: Tensor, ends_E: Tensor) -> Tensor:
    """[E, I, O]: x^T dy over the rows of each expert."""
    if _has_grouped(x_SI.t(), dy_SO):
        made_EIO = _grouped_mm(x_SI.t(), dy_SO, ends_E)
        if _leaves_empty(x_SI):
            empty_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1)) == 0
            made_EIO.masked_fill_(empty_E[:, None, None], 0)
        return made_EIO
    parts = [x_SI[rows].t() @ dy_SO[rows] for rows in _slices(ends_E)]
    return torch.stack(parts)


def _has_grouped(*factors: Tensor) -> bool:
    """Whether torch's grouped product takes them; said once where it does not."""
    if not all(_is_half_on_gpu(factor) for factor in factors):
        return False
    odd = [tuple(factor.shape) for factor in factors if not _is_aligned(factor)]
    if odd:
        _warn_once(str(odd[0]))
    return not odd


def _is_half_on_gpu(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16


def _is_aligned(x: Tensor) -> bool:
    """Rows or columns in one piece, each beginning at a multiple of 16 bytes, as TMA loads them."""
    *batch, rows, columns = x.stride()
    if columns != 1 and rows != 1:
        return False
    steps = [*batch, rows if columns == 1 else columns]
    return all(n * x.element_size() % _ALIGNMENT == 0 for n in (*steps, x.storage_offset()))


@functools.lru_cache(maxsize=16)
def _warn_once(shape: str) -> None:
    logger.warning(
        "experts run one after the other, which is slow: a matrix %s has no rows of a multiple of "
        "%d bytes",
        shape,
        _ALIGNMENT,
    )


def _leaves_empty(x: Tensor) -> bool:
    """Whether the gradient of an expert without rows might not be written.

    On Hopper it is zero (tests/kernels/test_expert_mlp.py, H100); no other card has been seen.
    """
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) != (9, 0)


def _padded_rank(p: ExpertProjection) -> ExpertProjection:
    """With rows of zeros in a and b up to a rank whose rows the grouped product takes."""
    missing = 0 if p.a is None else -p.a.shape[1] % _RANK_MULTIPLE
    if p.a is None or p.b is None or not missing:
        return p
    pad = torch.nn.functional.pad
    rows = (0, 0, 0, missing)
    return ExpertProjection(p.weight, pad(p.a, rows), pad(p.b, rows), p.scaling)


def _grouped_mm(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """torch's grouped product, which is public from 2.10 on."""
    public: Any = getattr(torch.nn.functional, "grouped_mm", None)
    run: Any = public or torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage]
    return run(a, b, offs=ends_E)


def _slices(ends_E: Tensor) -> list[slice]:
    ends = ends_E.tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _sorted_rows(index_Tk: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(order [S] of the (token, choice) pairs by expert, int32 ends [E] of the experts' rows).

    No wait for the device.
    """
    flat_S = index_Tk.flatten()
    order_S = torch.sort(flat_S, stable=True).indices
    counts_E = torch.zeros(experts, dtype=torch.int32, device=flat_S.device)
    counts_E.scatter_add_(0, flat_S, torch.ones_like(flat_S, dtype=torch.int32))
    return order_S, counts_E.cumsum(0, dtype=torch.int32)


def _project(x_SI: Tensor, p: ExpertProjection, ends_E: Tensor) -> tuple[Tensor, Tensor | None]:
    """(y [S, O], h [S, r])."""
    y_SO = _grouped(x_SI, p.weight.to(x_SI.dtype).transpose(1, 2), ends_E)
    if p.a is None or p.b is None:
        return y_SO, None
    h_Sr = _grouped(x_SI, p.a.to(x_SI.dtype).transpose(1, 2), ends_E)
    return y_SO.add_(_grouped(h_Sr, p.b.to(x_SI.dtype), ends_E), alpha=p.scaling), h_Sr


def _project_back(
    dy_SO: Tensor,
    x_SI: Tensor,
    h_Sr: Tensor | None,
    p: ExpertProjection,
    ends_E: Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """(dx [S, I], gradients of weight, a and b)."""
    kind = dy_SO.dtype
    dx_SI = _grouped(dy_SO, p.weight.to(kind), ends_E)
    dweight = da = db = None
    if wanted[0]:
        dweight = _grouped_gradient(dy_SO, x_SI, ends_E).to(p.weight.dtype)
    if p.a is not None and p.b is not None and h_Sr is not None:
        dh_Sr = _grouped(dy_SO, p.b.to(kind).transpose(1, 2), ends_E).mul_(p.scaling)
        dx_SI.add_(_grouped(dh_Sr, p.a.to(kind), ends_E))
        if wanted[1]:
            da = _grouped_gradient(dh_Sr, x_SI, ends_E).to(p.a.dtype)
        if wanted[2]:
            db = _grouped_gradient(h_Sr, dy_SO, ends_E).mul_(p.scaling).to(p.b.dtype)
    return dx_SI, [dweight, da, db]


def _summed(rows_SH: Tensor, order_S: Tensor, choices: int) -> Tensor:
    """[T, H]: the rows of each token added up, always in the same order."""
    back_S = torch.empty_like(order_S)
    back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    return rows_SH[back_S].view(-1, choices, rows_SH.shape[1]).sum(1)


# ---- autograd and public ----


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, index_Tk, weights_Tk, activation, scalings, *tensors):
        up_part, down_part = _projections(tensors, scalings)
        order_S, ends_E = _sorted_rows(index_Tk, len(tensors[0]))
        choices = index_Tk.shape[1]
        gate_up_S2F, h_Sr = _project(x_TH[order_S // choices], up_part, ends_E)
        gate_SF, up_SF = gate_up_S2F.chunk(2, dim=1)
        weight_S1 = weights_Tk.flatten()[order_S, None].to(x_TH.dtype)
        hidden_SF = swiglu.gated_forward(gate_SF, up_SF, activation).mul_(weight_S1)
        y_SH, down_h_Sr = _project(hidden_SF, down_part, ends_E)
        ctx.save_for_backward(
            x_TH, weights_Tk, order_S, ends_E, gate_up_S2F, h_Sr, down_h_Sr, *tensors
        )
        ctx.activation, ctx.scalings = activation, scalings
        return _summed(y_SH, order_S, choices)

    @staticmethod
    def backward(ctx, *grad_outputs):
        (dout_TH,) = grad_outputs
        x_TH, weights_Tk, order_S, ends_E, gate_up_S2F, h_Sr, down_h_Sr, *tensors = (
            ctx.saved_tensors
        )
        up_part, down_part = _projections(tensors, ctx.scalings)
        _, _, wants_weights, _, _, *wanted = ctx.needs_input_grad
        choices = weights_Tk.shape[1]
        token_S = order_S // choices
        weight_S1 = weights_Tk.flatten()[order_S, None].to(x_TH.dtype)
        gate_SF, up_SF = gate_up_S2F.chunk(2, dim=1)
        hidden_SF = swiglu.gated_forward(gate_SF, up_SF, ctx.activation)
        dweighted_SF, of_down = _project_back(
            dout_TH[token_S], hidden_SF * weight_S1, down_h_Sr, down_part, ends_E,
            tuple(wanted[3:]),
        )  # fmt: skip
        dweights_Tk = None
        if wants_weights:
            flat = torch.empty(len(order_S), dtype=torch.float32, device=x_TH.device)
            flat[order_S] = (dweighted_SF.float() * hidden_SF.float()).sum(1)
            dweights_Tk = flat.view_as(weights_Tk).to(weights_Tk.dtype)
        del hidden_SF
        dhidden_SF = dweighted_SF.mul_(weight_S1)
        both_S2F, _ = swiglu.gated_backward(dhidden_SF, gate_SF, up_SF, ctx.activation, False)
        del dhidden_SF, dweighted_SF
        dx_SH, of_up = _project_back(
            both_S2F, x_TH[token_S], h_Sr, up_part, ends_E, tuple(wanted[:3])
        )
        return _summed(dx_SH, order_S, choices), None, dweights_Tk, None, None, *of_up, *of_down


def _projections(
    tensors: Any, scalings: tuple[float, float]
) -> tuple[ExpertProjection, ExpertProjection]:
    w1, a1, b1, w2, a2, b2 = tensors
    return ExpertProjection(w1, a1, b1, scalings[0]), ExpertProjection(w2, a2, b2, scalings[1])


def expert_mlp(
    x_TH: Tensor,
    index_Tk: Tensor,
    weights_Tk: Tensor,
    gate_up: ExpertProjection,
    down: ExpertProjection,
    *,
    activation: str = "silu",
) -> Tensor:
    """The experts' results for each token, weighted and added up; [T, H] in the dtype of x.

    Args:
        index_Tk: int64, the experts of each token.
        weights_Tk: their routing weights.
        gate_up: of the two inner layers, gate's rows before up's: weight [E, 2F, H].
        down: weight [E, H, F].

    Raises:
        ValueError: when shapes do not fit together, or the activation is not known.
    """
    experts, twice, hidden = gate_up.weight.shape
    if down.weight.shape != (experts, hidden, twice // 2) or x_TH.shape[1:] != (hidden,):
        raise ValueError(
            f"experts take x [T, H], gate_up [E, 2F, H] and down [E, H, F], not "
            f"{tuple(x_TH.shape)}, {tuple(gate_up.weight.shape)}, {tuple(down.weight.shape)}"
        )
    if activation not in swiglu.ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(swiglu.ACTIVATIONS)}")
    padded = _padded_rank(gate_up), _padded_rank(down)
    parts = [t for p in padded for t in (p.weight, p.a, p.b)]
    scalings = gate_up.scaling, down.scaling
    return _ExpertMLP.apply(x_TH, index_Tk, weights_Tk, activation, scalings, *parts)
