"""Optimizers that Transformers does not build by name, and learning rates of single parameters."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers.training_args import OptimizerNames

from regrow.configs.optimizers import LOW_RANK, PACKAGES
from regrow.tasks.modeling.quantization import require_package
from regrow.tasks.stage import StageError
from regrow.tasks.train.spec import TrainSpec

_ALIASES = {"ao_adamw_8bit": "adamw_torch_8bit", "ao_adamw_4bit": "adamw_torch_4bit"}
_TRANSFORMERS = {name.value for name in OptimizerNames}


_CUDA_ONLY = {
    "paged_ademamix_8bit": "ademamix_8bit",
    "paged_ademamix_32bit": "ademamix",
}
"""Optimizers whose packages have no CPU code -> one that works there."""

_IN_PLACE = {"galore_adamw_8bit": "regrow.tasks.train.galore.GaLoreAdamW8bit"}
"""Optimizers that Transformers builds by name -> our class in place of the package's."""

_PROJECTORS = {
    "galore": ("galore_torch.galore_projector.GaLoreProjector",),
    "apollo": (
        "apollo_torch.random_projector.GradientProjector",
        "apollo_torch.svd_projector.GaLoreProjector",
    ),
}
"""Objects that low-rank optimizers keep in their states."""


def _imported(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def check_optimizer(spec: TrainSpec) -> None:
    """Raises StageError when the optimizer's package is missing: before a model is loaded."""
    if spec.optimizer in PACKAGES:
        install, module = PACKAGES[spec.optimizer]
        require_package(install, module, f"optimizer: {spec.optimizer}")
        importlib.import_module(module)  # and with it what its states in a checkpoint are made of
    if spec.optimizer == "galore_adamw_8bit":
        require_package("bitsandbytes", "bitsandbytes", f"optimizer: {spec.optimizer}")
    if spec.optimizer in _CUDA_ONLY and not torch.cuda.is_available():
        raise StageError(
            f"optimizer: {spec.optimizer} works on a CUDA device only, and there is none; use "
            f"{_CUDA_ONLY[spec.optimizer]}"
        )
    for name in _PROJECTORS.get(spec.optimizer.split("_")[0], ()):
        # A checkpoint holds them; reading it builds no other objects.
        torch.serialization.add_safe_globals([_imported(name)])


def projectors_onto_device(optimizer: Any) -> None:
    """After a resume: the tensors inside of a low-rank optimizer's projectors, which
    `load_state_dict` does not look into, onto the device of their parameter."""
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if type(value).__module__.split(".")[0] in ("galore_torch", "apollo_torch"):
                for name, inner in vars(value).items():
                    if isinstance(inner, torch.Tensor):
                        setattr(value, name, inner.to(parameter.device))


def class_in_place(name: str, cls: type[Optimizer]) -> type[Optimizer]:
    """What stands in for the class that Transformers takes for the optimizer; mostly that one."""
    return _imported(_IN_PLACE[name]) if name in _IN_PLACE else cls


def transformers_name(spec: TrainSpec) -> str:
    """What Transformers calls the optimizer; a stand-in where it has no name for it."""
    name = _ALIASES.get(spec.optimizer, spec.optimizer)
    return name if name in _TRANSFORMERS else "adamw_torch"


def transformers_arguments(spec: TrainSpec) -> dict[str, Any]:
    """The fields of `TrainingArguments` that say which optimizer, and its arguments."""
    arguments = dict(spec.optimizer_args)
    if spec.adam_beta3 is not None:
        arguments.setdefault("beta3", spec.adam_beta3)
    found: dict[str, Any] = {"optim": transformers_name(spec)}
    if arguments:
        found["optim_args"] = ",".join(f"{name}={value}" for name, value in arguments.items())
    if spec.optimizer in LOW_RANK:
        targets = list(spec.optimizer_targets)
        found["optim_target_modules"] = "all-linear" if targets == ["all-linear"] else targets
    return found


def own_optimizer(spec: TrainSpec) -> tuple[type[Optimizer], dict[str, Any]] | None:
    """(class, arguments) of one that Transformers has no name for; None for all others."""
    build = _OWN.get(spec.optimizer)
    if build is None:
        return None
    name, settings = build(spec)
    given = {key: _parsed(value) for key, value in spec.optimizer_args.items()}
    return _imported(name), {"lr": spec.learning_rate, **settings, **given}


def _adam(spec: TrainSpec) -> dict[str, Any]:
    return {"betas": (spec.adam_beta1, spec.adam_beta2), "eps": spec.adam_epsilon}


def _optimi(spec: TrainSpec) -> dict[str, Any]:
    """Its Triton kernels are its default, also where there is no GPU to run them."""
    return _adam(spec) | ({} if torch.cuda.is_available() else {"triton": False})


def _came(spec: TrainSpec) -> tuple[str, dict[str, Any]]:
    """CAME's own defaults for its third beta and second epsilon (arXiv 2307.02047)."""
    betas = (spec.adam_beta1, spec.adam_beta2, spec.adam_beta3 or 0.9999)
    return "came_pytorch.CAME", {
        "betas": betas,
        "eps": (spec.adam_epsilon, spec.adam_epsilon2 or 1e-16),
    }


_OWN: dict[str, Callable[[TrainSpec], tuple[str, dict[str, Any]]]] = {
    "ao_adamw_fp8": lambda spec: ("torchao.optim.AdamWFp8", _adam(spec)),
    "optimi_adamw": lambda spec: ("optimi.AdamW", _optimi(spec)),
    "stable_adamw": lambda spec: ("optimi.StableAdamW", _optimi(spec)),
    "came_pytorch": _came,
}


def _parsed(value: Any) -> Any:
    """A value of `optim_args` written as text: a number, true or false, or text after all."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(value.lower(), value))
    except (ValueError, SyntaxError):
        return value


def drop_empty_groups(optimizer: Optimizer) -> None:
    """Take out the groups that hold no parameter, such as LoRA's without weight decay.

    DeepSpeed takes them out too. Were they kept elsewhere, no checkpoint of the optimizer or of the
    schedule, which has a curve for each group, would fit both.
    """
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


# ---- parameters with learning rates of their own ----


def divides_parameters(spec: TrainSpec) -> bool:
    """Whether parameters do not all learn at one rate by one rule."""
    rates = spec.lr_groups or spec.embedding_lr or spec.loraplus_lr_ratio
    return bool(rates) or spec.optimizer == "muon"


def build_divided(
    model: Any, spec: TrainSpec, decayed: set[str], cls: type[Optimizer], kwargs: Mapping[str, Any]
) -> Optimizer:
    """An optimizer with a group of parameters for each rate.

    Args:
        decayed: names of the parameters that weight decay draws to zero.
        cls, kwargs: the optimizer's class and its arguments.

    Raises:
        StageError: when a group of `lr_groups` names no parameter that is trained.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if spec.optimizer == "muon":
        return MuonAdamW(*_muon_groups(model, trained, spec, decayed), spec)
    if spec.loraplus_lr_ratio:
        return create_loraplus_optimizer(
            model,
            cls,
            **{**kwargs, "lr": spec.learning_rate},
            loraplus_lr_ratio=spec.loraplus_lr_ratio,
            loraplus_lr_embedding=spec.loraplus_lr_embedding,
            loraplus_weight_decay=spec.weight_decay,
        )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    used = set()
    ends = _end_names(model)
    for name, parameter in trained.items():
        rate = spec.learning_rate
        if spec.embedding_lr and any(end in name.split(".") for end in ends):
            rate = spec.embedding_lr
        for index, group in enumerate(spec.lr_groups):
            if any(part in name for part in group.modules):
                rate = group.lr
                used.add(index)
                break
        decay = spec.weight_decay if name in decayed else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    for index, group in enumerate(spec.lr_groups):
        if index not in used:
            names = ", ".join(group.modules)
            raise StageError(f"lr_groups: no trained parameter's name holds any of {names}")
    return cls(
        [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()],
        **kwargs,
    )


def _end_names(model: Any) -> set[str]:
    """Last parts of the names of the embedding and the output head."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    found = {n.rpartition(".")[2] for n, m in model.named_modules() if any(m is e for e in ends)}
    return found | {"embed_tokens", "lm_head"}


def _muon_groups(
    model: Any, trained: Mapping[str, nn.Parameter], spec: TrainSpec, decayed: set[str]
) -> tuple[list[nn.Parameter], list[dict[str, Any]]]:
    """(matrices for Muon, groups for AdamW): embeddings, head and vectors go to AdamW."""
    ends = _end_names(model)
    matrices, others = [], {True: [], False: []}
    for name, parameter in trained.items():
        if parameter.dim() == 2 and not any(end in name.split(".") for end in ends):
            matrices.append(parameter)
        else:
            others[name in decayed].append(parameter)
    if not matrices:
        raise StageError("optimizer: muon trains matrices, and none is trained here")
    decays = {True: spec.weight_decay, False: 0.0}
    return matrices, [{"params": p, "weight_decay": decays[d]} for d, p in others.items() if p]


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for the matrices inside the model, AdamW for all else.

    Both learn at one rate: Muon's steps are scaled to the size of AdamW's (arXiv 2502.16982).
    """

    def __init__(
        self, matrices: list[nn.Parameter], others: list[dict[str, Any]], spec: TrainSpec
    ) -> None:
        given: dict[str, Any] = {k: _parsed(value) for k, value in spec.optimizer_args.items()}
        settings: dict[str, Any] = {"adjust_lr_fn": "match_rms_adamw"} | given
        muon = torch.optim.Muon(
            matrices,
            lr=spec.learning_rate,
            weight_decay=spec.weight_decay,
            **settings,
        )
        self._parts: list[Optimizer] = [muon]
        if others:
            self._parts.append(AdamW(others, lr=spec.learning_rate, **_adam(spec)))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """One set of groups and states, seen by this optimizer and by its parts."""
        self._parts[0].param_groups, rest = self.param_groups[:1], self.param_groups[1:]
        if rest:
            self._parts[1].param_groups = rest
        for part in self._parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of both."""
        assert closure is None, "the gradients are computed before"
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: Any) -> None:
        """As any optimizer's."""
        super().load_state_dict(state_dict)
        self._share()
