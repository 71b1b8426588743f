"""Puts our kernels into a loaded model, one module instance after the other, and says which.

No class is changed: a module of a known class (`families`) is replaced by one of ours that owns the
same parameters under the same names (`fused`, `loss_head`). What is not known, or what a kernel
cannot do exactly, stays as it is, with the reason.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from regrow.kernels import backend
from regrow.kernels.packed_attention import backends_used
from regrow.tasks.modeling.attention import NAME as PACKED
from regrow.tasks.modeling.attention import skip_mask
from regrow.tasks.modeling.families import Family, activation_of, family_of
from regrow.tasks.modeling.fused import (
    FusedAttention,
    FusedGateUpMLP,
    FusedMLP,
    FusedNorm,
    input_names,
)
from regrow.tasks.modeling.fused_experts import FusedExperts, why_not_experts
from regrow.tasks.modeling.fused_layer import can_take_rows, fused_layer, takes_sums
from regrow.tasks.modeling.loss_head import LossHead, LossTerms
from regrow.tasks.modeling.projections import same_dropout, why_not

logger = logging.getLogger(__name__)

KERNELS = ("attention", "mlp", "experts", "rms_norm", "cross_entropy")
"""All there are. attention: Q, K, V and output with LoRA, rotary embedding with the heads' norms;
mlp: the gated MLP with LoRA; experts: a layer of them with LoRA; rms_norm; cross_entropy: the
head's loss on supervised rows alone."""

WITH_ADAPTERS = ("attention", "mlp", "experts")
"""Those that compute a layer's adapter with it."""

_BY_KIND = {
    "Attention": "attention",
    "MLP": "mlp",
    "SparseMoeBlock": "experts",
    "RMSNorm": "rms_norm",
}
_SHARDED = "each process holds a part of the weights inside a layer"


@dataclass
class Swapped:
    """What was put in, and what was left and why."""

    modules: Counter[str] = field(default_factory=Counter)
    """How many modules of each kernel."""
    parts: Counter[str] = field(default_factory=Counter)
    """Of how many attentions the rotary embedding ("rope") and the heads' norms ("qk_norm") run
    in the kernel too, of how many layers the sums of the residual stream ("sums"), and whether the
    last layer computes supervised rows alone ("last_rows")."""
    left: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """{kernel or class: {why: names of its modules}}."""
    head: LossHead | None = None
    """The head that computes the loss, if that was put in."""

    def record(self) -> dict[str, Any]:
        """As the train stage's result names it."""
        parts: dict[str, Any] = {"parts": dict(self.parts)} if self.parts else {}
        if self.modules["attention"] and backends_used():
            parts["attention_by"] = backends_used()
        left = {kernel: self.reasons(kernel) for kernel in self.left}
        return {"swapped": dict(self.modules), "left": left, "runs": runs_on()} | parts

    def leave(self, kernel: str, why: str, module: str = "") -> None:
        """Note that a module, or all of a kernel's, stays as it is."""
        names = self.left.setdefault(kernel, {}).setdefault(why, [])
        names += [module] if module else []

    def reasons(self, kernel: str) -> dict[str, str]:
        """{why: how many modules, and which}."""
        return {why: _named(names) for why, names in self.left.get(kernel, {}).items()}


def _named(names: Sequence[str]) -> str:
    """`3 modules: a, b, c`; of many the first and the last."""
    if not names:
        return "all"
    some = names if len(names) <= 4 else [*names[:2], "...", names[-1]]
    return f"{len(names)} module{'s' if len(names) > 1 else ''}: {', '.join(some)}"


def runs_on() -> str:
    """By what the kernels run in this process: "Triton" or "PyTorch"."""
    return "Triton" if _has_gpu_kernels() or backend.INTERPRETING else "PyTorch"


def _has_gpu_kernels() -> bool:
    return torch.cuda.is_available() and backend.triton is not None


def chosen_kernels(wanted: str | Sequence[str], device: str) -> tuple[str, ...]:
    """Names of the kernels to put in: of "auto" all on CUDA with Triton, none elsewhere.

    Args:
        wanted: "auto", "off", or names in `KERNELS`, which then run on any device; "auto" among
            them: where "auto" puts in any.
        device: "cuda" or "cpu".
    """
    if "auto" in wanted and (device != "cuda" or backend.triton is None):
        return ()
    if isinstance(wanted, str):
        return KERNELS if wanted == "auto" else ()
    return tuple(name for name in KERNELS if name in wanted)


def swap_kernels(
    model: Any,
    kernels: Sequence[str],
    terms: LossTerms | None = None,
    *,
    whole_layers: bool = True,
    apart: Sequence[str] = (),
) -> Swapped:
    """Put the kernels into a model in place: after its adapter, before anything wraps it.

    Args:
        model: a causal language model, or a `PeftModel` around one.
        kernels: names in `KERNELS`.
        terms: of the loss in training, for "cross_entropy".
        whole_layers: all weights of a layer are there while it runs; not so where FSDP wraps parts
            of layers. Only norms are put in then.
        apart: those among the kernels whose weights are not there while they run.
    """
    done = Swapped()
    if not kernels:
        return done
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    family = family_of(base)
    if family is None:
        done.leave(type(base).__name__, "no kernels are known for this architecture")
        return _said(done)
    # Norms first: an attention that is replaced takes those of its heads over.
    for kernel in sorted(kernels, key=lambda name: name != "rms_norm"):
        if kernel in apart or (kernel != "rms_norm" and not whole_layers):
            done.leave(kernel, _SHARDED)
        elif kernel == "cross_entropy":
            _swap_head(model, base, terms or LossTerms(), done)
        else:
            _swap_modules(base, family, kernel, done)
    if "rms_norm" in kernels:
        _note_other_norms(base, family, done)
        if family.sums and whole_layers:
            _swap_layers(base, family, done)
            _take_last_rows(base, family, done)
    if "attention" in kernels and _takes_made_mask(base.config):
        # On the outermost, as that of the head.
        model.register_forward_pre_hook(skip_mask, with_kwargs=True)
    return _said(done)


def _takes_made_mask(config: Any) -> bool:
    """Whether nothing but attention reads the mask; no family of the table has one of its own."""
    reads = getattr(config, "output_router_logits", False)  # the routers' loss leaves padding out
    return config._attn_implementation == PACKED and not reads


def _swap_modules(base: nn.Module, family: Family, kernel: str, done: Swapped) -> None:
    for name, module in list(_of_kind(base, family, kernel)):
        why = _WHY_NOT[kernel](module)
        if why:
            done.leave(kernel, why, name)
            continue
        made = _MADE_BY[kernel](module, family)
        base.set_submodule(name, made)
        done.modules[kernel] += 1
        if isinstance(made, FusedAttention):
            done.parts.update(made.parts)


def _swap_layers(base: nn.Module, family: Family, done: Swapped) -> None:
    """Layers whose norms are ours leave them their sums."""
    for name, layer in list(base.named_modules()):
        if family.kind(layer) == "DecoderLayer" and takes_sums(layer):
            base.set_submodule(name, fused_layer(layer))
            done.parts["sums"] += 1


def _take_last_rows(base: nn.Module, family: Family, done: Swapped) -> None:
    """What neither layer nor head needs of the last layer's rows is left out, where both can."""
    its = f"{family.prefix}DecoderLayer"  # by name, as layers with sums have theirs
    layers = [module for module in base.modules() if type(module).__name__ == its]
    if done.head is not None and layers and can_take_rows(layers[-1]):
        last: Any = layers[-1]
        last.takes_rows = done.head.last_layer_takes_rows = True
        done.parts["last_rows"] = 1


def _note_other_norms(base: nn.Module, family: Family, done: Swapped) -> None:
    """Norms of classes that the kernel does not know."""
    for name, module in base.named_modules():
        kind = type(module).__name__
        known = isinstance(module, FusedNorm) or family.kind(module) == "RMSNorm"
        if kind.endswith("Norm") and not known:
            done.leave("rms_norm", f"a norm of type {kind}", name)


def _of_kind(base: nn.Module, family: Family, kernel: str) -> Iterator[tuple[str, nn.Module]]:
    for name, module in base.named_modules():
        kind = family.kind(module)
        if kind is not None and _BY_KIND.get(kind) == kernel:
            yield name, module


def _why_not_norm(norm: nn.Module) -> str:
    return "a hook is on the norm" if norm._forward_hooks or norm._forward_pre_hooks else ""


def _why_not_mlp(mlp: Any) -> str:
    if activation_of(mlp) is None:
        return "the kernels have not its activation"
    layers = [child for name, child in mlp.named_children() if name.endswith("_proj")]
    return _why_not_layers(layers)


def _why_not_attention(attention: Any) -> str:
    if attention.config._attn_implementation != PACKED:
        return f"the model's attention is {attention.config._attn_implementation}, not {PACKED}"
    if attention.attention_dropout:
        return "attention has dropout"
    names = (*input_names(attention), "o_proj")
    return _why_not_layers([getattr(attention, name) for name in names])


def _why_not_layers(layers: Sequence[nn.Module]) -> str:
    reasons = [why for layer in layers if (why := why_not(layer))]
    if not reasons and not same_dropout(layers):
        return "adapters of one layer differ in dropout"
    return reasons[0] if reasons else ""


def _fused_mlp(mlp: nn.Module, family: Family) -> nn.Module:
    return FusedGateUpMLP(mlp) if hasattr(mlp, "gate_up_proj") else FusedMLP(mlp)


def _fused_experts(block: nn.Module, family: Family) -> nn.Module:
    return FusedExperts(block)


def _fused_norm(norm: nn.Module, family: Family) -> nn.Module:
    return FusedNorm(norm, family.norm_offset)


_WHY_NOT = {
    "attention": _why_not_attention,
    "mlp": _why_not_mlp,
    "experts": why_not_experts,
    "rms_norm": _why_not_norm,
}
_MADE_BY = {
    "attention": FusedAttention,
    "mlp": _fused_mlp,
    "experts": _fused_experts,
    "rms_norm": _fused_norm,
}


def _swap_head(model: nn.Module, base: Any, terms: LossTerms, done: Swapped) -> None:
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        done.leave("cross_entropy", f"the head is a {type(head).__name__}, or has a bias")
        return
    softcap = getattr(base.config, "final_logit_softcapping", None)
    done.head = LossHead(head, softcap, terms)
    base.set_output_embeddings(done.head)
    base.loss_function = done.head.loss
    # On the outermost: PEFT goes past the hooks of the model inside.
    model.register_forward_pre_hook(done.head.listen, with_kwargs=True)
    done.modules["cross_entropy"] = 1


def _said(done: Swapped) -> Swapped:
    found = ", ".join(f"{name} in {count} modules" for name, count in done.modules.items())
    logger.info("kernels (%s): %s", runs_on(), found or "none")
    for kernel in done.left:
        for why, names in done.reasons(kernel).items():
            logger.info("kernels: %s stays as it is in %s: %s", kernel, names, why)
    return done
