"""Cross entropy of a linear head without the logits of the whole batch in memory.

Mathematics. For a hidden row h with target y, head W [V, H]:
    a = W h                          z = softcap * tanh(a / softcap)   (or z = a)
    lse = log sum_j exp z_j          log p_y = z_y - lse
    loss = lse - (1 - e) z_y - e mean_j z_j + c lse^2
with label smoothing e (Szegedy et al. 2015, arXiv 1512.00567, section 7) and z-loss c (PaLM,
arXiv 2204.02311, section 5). Its gradient, with p = softmax(z):
    dloss/dz_j = p_j (1 + 2 c lse) - (1 - e) [j = y] - e / V
    dz/da = 1 - (z / softcap)^2
Rows whose target is -100 are never multiplied by the head. The rest go through in chunks: one
GEMM gives a chunk's logits in float32, one kernel replaces them by their gradient in place, two
GEMMs turn that into the gradients of hidden and head. So the backward pass has nothing left to
do but scale, as in Liger (Hsu et al. 2024, arXiv 2410.10989); float32 logits and the skipped
rows are not Liger's.

`linear_log_probs` gives log p_y per row, for preference and RL losses. Its upstream gradient is
not known in the forward pass, so the backward pass makes the logits again.

Sharding (FSDP2, DeepSpeed ZeRO-3): call these from inside the forward of the module that owns
the head, where its hook has gathered it; only plain local tensors are taken. Nothing is kept
outside saved tensors, so gradient checkpointing of either kind may wrap the call.

Shape legend: N rows, H hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from regrow.kernels.backend import custom_op
from regrow.kernels.cross_entropy_rows import losses_and_gradients
from regrow.kernels.matmul import matmul

IGNORED = -100  # Hugging Face's label of tokens that are not trained

# Bytes of float32 logits at a time: 2048 rows of a vocabulary of 152k. 8192 x 4096 x 151936 took
# 54.5, 51.2, 54.6 and 47.6 ms with chunks of 0.6, 1.25, 2.5 and 5 GiB (H100, 2026-11-22).
LOGITS_BYTES = 5 << 28
SCARCE_LOGITS_BYTES = 1 << 28
"""The same where memory is short: 512 rows of 128256 columns still keep each product full."""
_ROW_MULTIPLE = 128
"""Rows of a GEMM tile. On CUDA rows of zeros make the last chunk a multiple too: cuBLAS looks for a
kernel for every new number of rows, and to load one waits for the device. In two steps of three the
host did wait about here, and in one of fourteen since (with the last layer's rows as
`regrow.tasks.modeling.batches` counts them; H100, 2026-11-23)."""
_COLUMN_MULTIPLE = 8  # 16-byte rows of bfloat16, which cuBLAS needs for its fast kernels


# ---- reference ----


def reference(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets_N: Tensor,
    weights_N: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(sum of weighted losses [], log-probabilities [N], 0 where ignored), by the formula."""
    kept_N = targets_N != IGNORED
    logits = hidden_NH[kept_N] @ head_VH.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(-1)
    picked = logits.gather(1, targets_N[kept_N, None])[:, 0]
    loss = lse - (1 - label_smoothing) * picked - label_smoothing * logits.mean(-1)
    loss = loss + z_loss * lse.square()
    if weights_N is not None:
        loss = loss * weights_N[kept_N]
    log_probs_N = torch.zeros(targets_N.shape, dtype=logits.dtype, device=logits.device)
    return loss.sum(), log_probs_N.masked_scatter(kept_N, picked - lse)


# ---- host ----


def _chunk_rows(rows: int, columns: int, budget: int) -> int:
    """Rows of a chunk: as many as the budget holds, and all chunks about as large."""
    most = max(budget // (4 * columns) // _ROW_MULTIPLE, 1) * _ROW_MULTIPLE
    chunks = -(-rows // most)
    even = -(-rows // max(chunks, 1))
    return max(-(-even // _ROW_MULTIPLE) * _ROW_MULTIPLE, 1)


def _padded(columns: int) -> int:
    return -(-columns // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE


def _sum_dtype(head_VH: Tensor, rows: int, chunk_rows: int, exact: bool) -> torch.dtype:
    """Several chunks add up in float32 at least; one is rounded once, unless `exact`."""
    wide = torch.promote_types(head_VH.dtype, torch.float32)
    return wide if exact or rows > chunk_rows else head_VH.dtype


def _fake(hidden_NH, head_VH, targets_N, rows_n, weights_N, options, flags, budget):
    losses_N, log_probs_N = (
        hidden_NH.new_empty(targets_N.shape, dtype=torch.float32) for _ in range(2)
    )
    dhidden = torch.empty_like(hidden_NH) if flags[0] else hidden_NH.new_empty(0)
    dhead = hidden_NH.new_empty(0)
    if flags[1]:
        rows = _chunk_rows(len(hidden_NH), _padded(len(head_VH)), budget)
        dhead = torch.empty_like(head_VH, dtype=_sum_dtype(head_VH, len(hidden_NH), rows, flags[2]))
    return losses_N, log_probs_N, dhidden, dhead


@custom_op(
    "linear_cross_entropy",
    "(Tensor hidden, Tensor head, Tensor targets, Tensor? rows, Tensor? weights, "
    "float[] options, bool[] flags, int budget) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
def _linear_cross_entropy(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets_N: Tensor,
    rows_n: Tensor | None,
    weights_N: Tensor | None,
    options: list[float],
    flags: list[bool],
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses [N], log-probs [N], dhidden [N, H] or [0], dhead [V, H] or [0]) of the sum."""
    if rows_n is None:
        rows_n = (targets_N != IGNORED).nonzero()[:, 0]
    n, more = len(rows_n), _rows_more(rows_n)
    some = torch.ones_like(rows_n, dtype=torch.float32)
    weights_n = some if weights_N is None else weights_N.index_select(0, rows_n).float()
    weights_n = pad(weights_n, (0, more))  # more rows have no loss, whatever their target
    targets_n = pad(targets_N.index_select(0, rows_n), (0, more))
    losses_n, log_probs_n = torch.empty(2, n + more, device=hidden_NH.device)
    hidden_nH = _taken(hidden_NH, rows_n, more)
    dhidden_nH = torch.empty_like(hidden_nH) if flags[0] else None
    rows = _chunk_rows(len(hidden_NH), _padded(len(head_VH)), budget)
    kind = _sum_dtype(head_VH, len(hidden_NH), rows, flags[2])
    dhead_VH = torch.empty_like(head_VH, dtype=kind) if flags[1] else None
    _through_chunks(
        hidden_nH, head_VH, targets_n, weights_n, losses_n, log_probs_n, dhidden_nH, dhead_VH,
        options, rows,
    )  # fmt: skip
    dhidden_NH = torch.zeros_like(hidden_NH) if flags[0] else hidden_NH.new_empty(0)
    if dhidden_nH is not None:
        dhidden_NH.index_copy_(0, rows_n, dhidden_nH[:n])
    return (
        _scattered(losses_n[:n], rows_n, targets_N),
        _scattered(log_probs_n[:n], rows_n, targets_N),
        dhidden_NH,
        hidden_NH.new_empty(0) if dhead_VH is None else dhead_VH,
    )


def _rows_more(rows_n: Tensor) -> int:
    """Rows of zeros behind those with a target."""
    return -len(rows_n) % _ROW_MULTIPLE if rows_n.is_cuda else 0


def _taken(hidden_NH: Tensor, rows_n: Tensor, more: int) -> Tensor:
    """[n + more, H]: the rows, then zeros."""
    n = len(rows_n)
    taken = hidden_NH.new_empty(n + more, hidden_NH.shape[1])
    torch.index_select(hidden_NH, 0, rows_n, out=taken[:n])
    taken[n:] = 0
    return taken


def _scattered(values_n: Tensor, rows_n: Tensor, like_N: Tensor) -> Tensor:
    """[N] with the values in their rows and 0 elsewhere."""
    return values_n.new_zeros(like_N.shape).index_copy_(0, rows_n, values_n)


def _through_chunks(
    hidden_nH: Tensor,
    head_VH: Tensor,
    targets_n: Tensor,
    weights_n: Tensor,
    losses_n: Tensor,
    log_probs_n: Tensor,
    dhidden_nH: Tensor | None,
    dhead_VH: Tensor | None,
    options: list[float],
    rows: int,
) -> None:
    """Fills losses, log_probs and the two gradients, `rows` rows at a time."""
    n, columns = len(hidden_nH), len(head_VH)
    dtype = hidden_nH.dtype
    exact = torch.promote_types(dtype, torch.float32)
    buffer = torch.empty(min(rows, n), _padded(columns), dtype=exact, device=hidden_nH.device)
    has_grad = dhead_VH is not None or dhidden_nH is not None
    if dhead_VH is not None and n == 0:
        dhead_VH.zero_()
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        chunk_CH = hidden_nH[part]
        logits_CV = buffer[: len(chunk_CH), :columns]
        grads_CV = buffer.view(dtype)[: len(chunk_CH), :columns]
        matmul(chunk_CH, head_VH.t(), logits_CV)
        losses_n[part], log_probs_n[part] = losses_and_gradients(
            logits_CV, grads_CV, targets_n[part], weights_n[part], options, has_grad
        )
        if not grads_CV.is_cuda:
            # torch 2.13's bfloat16 product reads past the columns of a padded matrix on CPU.
            grads_CV = grads_CV.contiguous()
        if dhidden_nH is not None:
            matmul(grads_CV, head_VH, dhidden_nH[part])
        if dhead_VH is not None:
            matmul(grads_CV.t(), chunk_CH, dhead_VH, add=start > 0)


# ---- autograd ----


class _LossSum(torch.autograd.Function):
    """Gradients are made in the forward pass, for an upstream gradient of one."""

    @staticmethod
    def forward(
        ctx, hidden_NH, head_VH, low_VH, targets_N, rows_n, weights_N, options, flags, budget
    ):
        low_VH = head_VH.to(hidden_NH.dtype) if low_VH is None else low_VH
        losses_N, _, dhidden, dhead = _linear_cross_entropy(
            hidden_NH, low_VH, targets_N, rows_n, weights_N, options, flags, budget
        )
        ctx.save_for_backward(dhidden, dhead)
        ctx.flags, ctx.dtype = flags, head_VH.dtype
        return losses_N.sum()

    @staticmethod
    def backward(ctx, *grad_outputs):
        (upstream,) = grad_outputs
        dhidden, dhead = ctx.saved_tensors
        dhidden = _scaled(dhidden, upstream, dhidden.dtype) if ctx.flags[0] else None
        dhead = _scaled(dhead, upstream, ctx.dtype) if ctx.flags[1] else None
        return dhidden, dhead, *[None] * 7


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * upstream, rounded once, without a float32 copy between.

    A factor of no dimensions would first be rounded to the gradient's type: with bfloat16 every
    gradient of a step would be wrong by one factor of up to 0.4 %.
    """
    factor = upstream.reshape(1, 1)
    if torch.compiler.is_compiling():
        return (gradient * factor).to(dtype)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


class _LogProbs(torch.autograd.Function):
    """d log p_y = -(d loss): the backward pass is a loss whose row weights are -upstream."""

    @staticmethod
    def forward(ctx, hidden_NH, head_VH, targets_N, rows_n, options, flags, budget):
        _, log_probs_N, _, _ = _linear_cross_entropy(
            hidden_NH, head_VH, targets_N, rows_n, None, options, [False] * 3, budget
        )
        ctx.save_for_backward(hidden_NH, head_VH, targets_N, rows_n)
        ctx.options, ctx.flags, ctx.budget = options, flags, budget
        return log_probs_N

    @staticmethod
    def backward(ctx, *grad_outputs):
        (upstream_N,) = grad_outputs
        hidden_NH, head_VH, targets_N, rows_n = ctx.saved_tensors
        _, _, dhidden, dhead = _linear_cross_entropy(
            hidden_NH, head_VH, targets_N, rows_n, -upstream_N, ctx.options, ctx.flags, ctx.budget
        )
        dhidden = dhidden if ctx.flags[0] else None
        return dhidden, dhead.to(head_VH.dtype) if ctx.flags[1] else None, *[None] * 5


# ---- public ----


def linear_cross_entropy(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets_N: Tensor,
    *,
    rows_n: Tensor | None = None,
    rounded_VH: Tensor | None = None,
    weights_N: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logits_bytes: int = LOGITS_BYTES,
) -> Tensor:
    """Weighted sum of the losses of all rows with a target, over `normalizer`; float32 [].

    Args:
        head_VH: of the dtype of hidden, or float32: then its gradient is float32 too.
        targets_N: int64, the token that row i should give (already shifted); -100 is ignored.
        rounded_VH: a float32 head in the dtype of hidden, where its owner keeps it so.
        rows_n: int64 indices of the rows with a target. Without it they are looked up, which
            makes the host wait for the device once a call.
        weights_N: one factor per row (z-loss included); takes no gradient.
        normalizer: default is the number of rows with a target (at least one).
        softcap: Gemma 2's cap on logits (arXiv 2408.00118); None or 0 is none.
        z_loss: factor of lse^2.
        logits_bytes: memory of the logits of a chunk, in bytes.

    Raises:
        ValueError: when shapes do not fit together.
    """
    _check(hidden_NH, head_VH, targets_N, weights_N)
    if normalizer is None:
        count = (targets_N != IGNORED).sum() if rows_n is None else rows_n.shape[0]
        normalizer = count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
    options = [softcap or 0.0, label_smoothing, z_loss]
    total = _LossSum.apply(
        hidden_NH, head_VH, rounded_VH, targets_N, rows_n, weights_N, options,
        _wants(hidden_NH, head_VH), logits_bytes,
    )  # fmt: skip
    return total / normalizer


def linear_log_probs(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets_N: Tensor,
    *,
    rows_n: Tensor | None = None,
    softcap: float | None = None,
    logits_bytes: int = LOGITS_BYTES,
) -> Tensor:
    """log p of each row's target, float32 [N], 0 where ignored; arguments as above.

    Raises:
        ValueError: when shapes do not fit together.
    """
    _check(hidden_NH, head_VH, targets_N, None)
    return _LogProbs.apply(
        hidden_NH, head_VH.to(hidden_NH.dtype), targets_N, rows_n, [softcap or 0.0, 0.0, 0.0],
        _wants(hidden_NH, head_VH), logits_bytes,
    )  # fmt: skip


def _wants(hidden_NH: Tensor, head_VH: Tensor) -> list[bool]:
    """Which gradients to make, and whether the head's is exact.

    None where autograd is off (evaluation, reentrant checkpoints).
    """
    enabled = torch.is_grad_enabled()
    wider = head_VH.dtype != hidden_NH.dtype
    return [enabled and hidden_NH.requires_grad, enabled and head_VH.requires_grad, wider]


def _check(hidden_NH: Tensor, head_VH: Tensor, targets_N: Tensor, weights_N: Tensor | None) -> None:
    rows, size = hidden_NH.shape if hidden_NH.ndim == 2 else (-1, -1)
    if head_VH.ndim != 2 or head_VH.shape[1] != size or targets_N.shape != (rows,):
        raise ValueError(
            "linear cross entropy takes hidden [N, H], head [V, H], targets [N], not "
            f"{tuple(hidden_NH.shape)}, {tuple(head_VH.shape)}, {tuple(targets_N.shape)}"
        )
    if head_VH.dtype not in (hidden_NH.dtype, torch.float32):
        raise ValueError(f"hidden is {hidden_NH.dtype} and head is {head_VH.dtype}; cast one")
    if weights_N is not None and (weights_N.shape != (rows,) or weights_N.requires_grad):
        raise ValueError(f"weights must be [{rows}] and take no gradient")
