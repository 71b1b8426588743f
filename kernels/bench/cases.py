"""What the kernel bench measures: each op at sizes of real models, against its rivals.

A case gives inputs and, for each rival, a function of them; the first rival is ours. `small` are
inputs of the same kind on which ours is compared with the reference before anything is timed.
Liger's kernels take part where the package is installed.

Sizes: Llama-3.1-8B (hidden 4096, width 14336, 32 and 8 heads of 128, vocabulary 128256) and
Qwen3-8B's vocabulary (151936), 8192 packed tokens.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from regrow.kernels import linear_cross_entropy as lce
from regrow.kernels import lora_linear, lora_mlp, nf4, rms_norm, swiglu
from regrow.kernels import rope as rope_op
from regrow.kernels.float8 import Float8Weight
from regrow.kernels.projection import Projection

Op = Callable[..., Any]

TOKENS, HIDDEN, WIDTH, RANK = 8192, 4096, 14336, 16


@dataclass(frozen=True)
class Case:
    """One op at one size; `inputs(True)` are small ones for the check."""

    op: str
    size: str
    inputs: Callable[[bool], list[Tensor]]
    reference: Op
    rivals: dict[str, Op] = field(default_factory=dict)
    captured: bool = True  # timed as a CUDA graph: the device's time, without the host's


def leaf(*shape: int, scale: float = 1.0, trained: bool = True, kind: Any = None) -> Tensor:
    made = torch.randn(shape, device="cuda") * scale
    return made.to(kind or torch.bfloat16).requires_grad_(trained)


def liger(name: str) -> Any:
    """A function of `liger_kernel.transformers.functional`, or None without the package."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), name)


def rivals(ours: Op, torch_op: Op, other: Op | None = None) -> dict[str, Op]:
    named = {"regrow": ours, "torch": torch_op}
    return named if other is None else named | {"liger": other}


# ---- the head ----


def head_case(op: str, tokens: int, columns: int, trained: bool, supervised: float) -> Case:
    def inputs(small: bool) -> list[Tensor]:
        n, size, v = (300, 64, 1001) if small else (tokens, HIDDEN, columns)
        targets = torch.randint(0, v, (n,), device="cuda")
        targets[torch.rand(n, device="cuda") >= supervised] = lce.IGNORED
        return [leaf(n, size), leaf(v, size, scale=size**-0.5, trained=trained), targets]

    def ours(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return lce.linear_cross_entropy(h, w, y)

    def plain(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(h, w).float()  # as in Transformers' loss
        return torch.nn.functional.cross_entropy(logits, y)

    def exact(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return lce.reference(h, w, y)[0] / (y != lce.IGNORED).sum()

    fused = liger("liger_fused_linear_cross_entropy")
    other = None if fused is None else lambda h, w, y: first(fused(h, w, y))
    kind = "trained" if trained else "frozen"
    size = f"{tokens} x {HIDDEN} x {columns}, {kind}, {supervised:.0%} supervised"
    # Rows with a target are looked up, for which the host waits: no graph can hold that.
    return Case(op, size, inputs, exact, rivals(ours, plain, other), captured=False)


def log_probs_case() -> Case:
    base = head_case("linear_log_probs", TOKENS, 128256, False, 1.0)

    def plain(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(h, w).float()
        return -torch.nn.functional.cross_entropy(logits, y, reduction="none")

    return Case(
        base.op,
        base.size,
        base.inputs,
        lambda h, w, y: lce.reference(h, w, y)[1],
        rivals(lambda h, w, y: lce.linear_log_probs(h, w, y), plain),
        captured=False,
    )


def first(outputs: Any) -> Any:
    return outputs[0] if isinstance(outputs, tuple) else outputs


# ---- projections ----


def group_inputs(sizes: Sequence[tuple[int, int]], rank: int) -> list[Tensor]:
    """weight, a and b of each (outputs, inputs); float32 adapters."""
    tensors = []
    for outputs, inputs in sizes:
        tensors.append(leaf(outputs, inputs, scale=inputs**-0.5, trained=False))
        tensors.append(leaf(rank, inputs, scale=inputs**-0.5, kind=torch.float32))
        tensors.append(leaf(outputs, rank, scale=rank**-0.5, kind=torch.float32))
    return tensors


def group(tensors: Sequence[Tensor]) -> list[Projection]:
    return [Projection(*tensors[i : i + 3], scaling=2.0) for i in range(0, len(tensors), 3)]


def in_8_bits(projections: Sequence[Projection], made: dict[int, Float8Weight]) -> list[Projection]:
    """The projections over 8-bit weights, which are rounded on the first call alone: those of one
    input together, as in training."""
    for _, together in groupby(projections, lambda p: p.weight.shape[1]):  # pyright: ignore
        weights: list[Any] = [projection.weight for projection in together]
        if weights[0].data_ptr() not in made:
            rounded = Float8Weight.of_group(weights)
            made.update(zip((w.data_ptr() for w in weights), rounded, strict=True))
    return [replace(p, weight=made[p.weight.data_ptr()]) for p in projections]  # pyright: ignore


def in_4_bits(
    projections: Sequence[Projection], made: dict[int, nf4.Nf4Weight]
) -> list[Projection]:
    """The projections over random weights in nf4 with double quantization."""

    def weight(shape: Any, scale: float) -> nf4.Nf4Weight:
        count = shape[0] * shape[1]
        packed, blocks = (
            torch.randint(0, 256, (n,), device="cuda", dtype=torch.uint8)
            for n in (count // 2, -(-count // 64))
        )
        code, code2 = (torch.linspace(-1, 1, n, device="cuda") for n in (16, 256))
        scale2 = torch.full((-(-len(blocks) // 256),), scale, device="cuda")
        scales = nf4.Scales(blocks, 64, code2, scale2, 2 * scale2[0], 256)
        return nf4.Nf4Weight(packed, code, scales, tuple(shape), torch.bfloat16)

    for projection in projections:
        dense = projection.weight
        assert isinstance(dense, Tensor)
        if dense.data_ptr() not in made:
            made[dense.data_ptr()] = weight(dense.shape, dense.shape[1] ** -0.5)
    return [replace(p, weight=made[p.weight.data_ptr()]) for p in projections]  # pyright: ignore


def lora_case(name: str, outputs: Sequence[int], inputs: int) -> Case:
    def made(small: bool) -> list[Tensor]:
        x, size = (130, 72) if small else (TOKENS, inputs)
        sizes = [(o // 64 if small else o, size) for o in outputs]
        return [leaf(x, size), *group_inputs(sizes, RANK)]

    def plain(x: Tensor, *tensors: Tensor) -> list[Tensor]:
        return [lora_linear.reference(x, p) for p in group(tensors)]

    weights8: dict[int, Float8Weight] = {}

    def eighth(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return lora_linear.lora_linear(x, *in_8_bits(group(tensors), weights8))

    weights4: dict[int, nf4.Nf4Weight] = {}

    def fourth(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return lora_linear.lora_linear(x, *in_4_bits(group(tensors), weights4))

    size = f"{name}: {TOKENS} x {inputs} -> {' + '.join(map(str, outputs))}, r {RANK}"
    fused = rivals(lambda x, *t: lora_linear.lora_linear(x, *group(t)), plain)
    fused |= {"regrow float8": eighth, "regrow nf4": fourth}
    return Case("lora_linear", size, made, plain, fused)


def mlp_case() -> Case:
    def made(small: bool) -> list[Tensor]:
        tokens, hidden, width = (130, 72, 200) if small else (TOKENS, HIDDEN, WIDTH)
        sizes = [(width, hidden), (width, hidden), (hidden, width)]
        return [leaf(tokens, hidden), *group_inputs(sizes, RANK)]

    def plain(x: Tensor, *tensors: Tensor) -> Tensor:
        gate, up, down = group(tensors)
        return lora_mlp.reference(x, gate, up, down)

    weights8: dict[int, Float8Weight] = {}

    def eighth(x: Tensor, *tensors: Tensor) -> Tensor:
        gate, up, down = in_8_bits(group(tensors), weights8)
        return lora_mlp.lora_mlp(x, gate, up, down)

    fused = rivals(lambda x, *t: lora_mlp.lora_mlp(x, *group(t)), plain)
    fused |= {"regrow float8": eighth}
    return Case("lora_mlp", f"{TOKENS} x {HIDDEN} x {WIDTH}, r {RANK}", made, plain, fused)


# ---- pointwise ----


def norm_case(residual: bool = False, beside: bool = False) -> Case:
    def made(small: bool) -> list[Tensor]:
        shape = (130, 77) if small else (TOKENS, HIDDEN)
        return [leaf(*shape), *([leaf(*shape)] if residual else []), leaf(shape[1], trained=False)]

    other = liger("liger_rms_norm")
    if residual:
        return Case(
            "add_rms_norm", f"{TOKENS} x {HIDDEN}, frozen weight", made,
            lambda x, r, w: rms_norm.reference(x, w, 1e-5, r),
            rivals(lambda x, r, w: rms_norm.add_rms_norm(x, r, w, 1e-5),
                   lambda x, r, w: (torch.rms_norm(x + r, w.shape, w, 1e-5), x + r)),
        )  # fmt: skip
    if beside:
        return Case(
            "rms_norm_beside", f"{TOKENS} x {HIDDEN}, frozen weight", made,
            lambda x, w: (rms_norm.reference(x, w, 1e-5)[0], x * 1),
            rivals(lambda x, w: rms_norm.rms_norm_beside(x, w, 1e-5),
                   lambda x, w: (torch.rms_norm(x, w.shape, w, 1e-5), x * 1)),
        )  # fmt: skip
    return Case(
        "rms_norm", f"{TOKENS} x {HIDDEN}, frozen weight", made,
        lambda x, w: rms_norm.reference(x, w, 1e-5)[0],
        rivals(lambda x, w: rms_norm.rms_norm(x, w, 1e-5),
               lambda x, w: torch.rms_norm(x, w.shape, w, 1e-5),
               other and (lambda x, w: other(x, w, 1e-5))),
    )  # fmt: skip


def rope_case(norms: bool) -> Case:
    def made(small: bool) -> list[Tensor]:
        n, q, k, d = (33, 3, 2, 20) if small else (TOKENS, 32, 8, 128)
        angle = torch.rand(n, d // 2, device="cuda") * 6
        weights = [leaf(d), leaf(d)] if norms else []
        return [leaf(n, q, d), leaf(n, k, d), angle.cos(), angle.sin(), *weights]

    def ours(q, k, cos, sin, qw=None, kw=None):
        return rope_op.rope(q, k, cos, sin, q_weight_D=qw, k_weight_D=kw)

    def plain(q, k, cos, sin, qw=None, kw=None):
        return [rope_op.reference(x, cos, sin, w, 1e-6) for x, w in ((q, qw), (k, kw))]

    name = "rope with norms" if norms else "rope"
    return Case(name, f"{TOKENS} x (32 + 8) x 128", made, plain, rivals(ours, plain))


def swiglu_case() -> Case:
    def made(small: bool) -> list[Tensor]:
        shape = (130, 1025) if small else (TOKENS, WIDTH)
        return [leaf(*shape), leaf(*shape)]

    return Case(
        "swiglu", f"{TOKENS} x {WIDTH}", made, swiglu.reference,
        rivals(swiglu.gated_activation, swiglu.reference, liger("liger_swiglu")),
    )  # fmt: skip


def all_cases() -> list[Case]:
    return [
        head_case("linear_cross_entropy", TOKENS, 151936, True, 1.0),
        head_case("linear_cross_entropy", TOKENS, 151936, False, 1.0),
        head_case("linear_cross_entropy", TOKENS, 128256, False, 0.65),
        log_probs_case(),
        lora_case("qkv", (4096, 1024, 1024), HIDDEN),
        lora_case("o", (4096,), HIDDEN),
        lora_case("down", (4096,), WIDTH),
        mlp_case(),
        norm_case(),
        norm_case(beside=True),
        norm_case(residual=True),
        rope_case(False),
        rope_case(True),
        swiglu_case(),
    ]
