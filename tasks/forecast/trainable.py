"""Which parameters a recipe trains: how many, and at which weights of the model they sit.

The rules of matching names are those of PEFT 0.21 and of `regrow.tasks.modeling.adapter`;
`tests/tasks/forecast/test_trainable.py` compares with both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from regrow.tasks.forecast.model_shape import ModelShape, Weight
from regrow.tasks.modeling.adapter_settings import AdapterSettings

_QV = ("q_proj", "v_proj")
# PEFT's targets where none are named, for the families that it has any for.
_DEFAULT_TARGETS: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _QV
)
_ROWS = re.compile(r"\[\d+:\d+\]$")


class UnknownTargetsError(ValueError):
    """Which layers get an adapter cannot be told without the model."""


@dataclass(frozen=True)
class Trainable:
    """What a training changes."""

    base: int = 0
    """Parameters of the model itself."""
    adapter: int = 0
    """Parameters of low-rank matrices and magnitudes."""
    whole: int = 0
    """Parameters of layers, or rows of embeddings, that are trained beside an adapter."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Name of an adapted weight -> rank."""
    names: frozenset[str] = frozenset()
    """Of the model's own weights that are trained."""
    dora: bool = False
    dropout: bool = False

    @property
    def total(self) -> int:
        """Parameters with a gradient."""
        return self.base + self.adapter + self.whole

    @property
    def has_adapter(self) -> bool:
        """Whether the model itself is frozen."""
        return bool(self.adapter or self.whole)


def all_weights(shape: ModelShape, patterns: Sequence[str] = ()) -> Trainable:
    """Training without an adapter: of the weights whose names match, or of all."""
    names = {w.name for w in shape.weights if not patterns or _starts(w, shape, patterns)}
    return Trainable(
        base=sum(w.numel for w in shape.weights if w.name in names), names=frozenset(names)
    )


def _starts(weight: Weight, shape: ModelShape, patterns: Sequence[str]) -> bool:
    names = [weight.name]
    if shape.tied and weight.kind == "embedding":
        names.append("lm_head.weight")
    return any(re.match(_ROWS.sub("", p), name) for p in patterns for name in names)


def with_adapter(shape: ModelShape, settings: AdapterSettings) -> Trainable:
    """Training an adapter.

    Raises:
        UnknownTargetsError: when the recipe leaves the choice of layers to PEFT, which has none, or
            when it names none that the model has.
    """
    asked, settings = settings, _renamed(shape, settings)
    ranks: dict[str, int] = {}
    parameters = 0
    for weight in _modules(shape):
        if _is_target(weight, shape, settings):
            rank = ranks[weight.name] = _rank(weight.module, settings)
            parameters += rank * sum(weight.shape) + (weight.shape[0] if settings.dora else 0)
    for weight in shape.weights:
        if any(f".{weight.name}".endswith(f".{end}") for end in settings.target_parameters):
            rank = ranks[weight.name] = _rank(weight.name, settings)
            experts = weight.shape[0] if len(weight.shape) == 3 else 1
            parameters += rank * experts * sum(weight.shape[-2:])
    if not ranks and not settings.trainable_tokens:
        named = asked.target_modules or asked.target_parameters
        raise UnknownTargetsError(
            f"lora_target_modules: {shape.model_type} has no layer that {named!r} names"
            + (" among those of peft_layers_to_transform" if asked.layers else "")
        )
    return Trainable(
        adapter=parameters,
        whole=_saved(shape, settings) + _token_rows(shape, settings),
        ranks=ranks,
        dora=settings.dora,
        dropout=settings.dropout > 0,
    )


def _renamed(shape: ModelShape, settings: AdapterSettings) -> AdapterSettings:
    """Names that once were linear layers of each expert, as PEFT reads them: stacked parameters.

    It does so for every layer of such a name, also where it is a plain or a shared MLP.
    """
    old = shape.family.experts.renamed if shape.family.experts else None
    if old is None:
        return settings
    gate, up, down = old
    names = {"gate": "gate.weight", gate: "gate_up_proj", up: "gate_up_proj", down: "down_proj"}
    wanted = _leaves(shape, settings, names)
    of_experts = {t: names[t.rpartition(".")[2]] for t in wanted if t.rpartition(".")[2] in names}
    found = {target.rpartition(".")[2] for target in of_experts} & {gate, up}
    if len(found) == 1:
        raise UnknownTargetsError(
            f"lora_target_modules: {gate} and {up} are one matrix in {shape.model_type}; name both"
        )
    doubled = {r".*\.gate_up_proj": 2 * settings.r} if found else {}
    return replace(
        settings,
        target_modules=tuple(sorted(wanted - set(of_experts))) or ("",),
        target_linear=False,
        target_parameters=(*settings.target_parameters, *sorted(set(of_experts.values()))),
        rank_pattern={**settings.rank_pattern, **doubled},
    )


def _leaves(shape: ModelShape, settings: AdapterSettings, names: Mapping[str, str]) -> set[str]:
    """The targets by the last part of their names, as far as PEFT resolves them so."""
    wanted = settings.target_modules
    linear = {w.module for w in shape.weights if w.kind == "linear" and w.module != "lm_head"}
    if isinstance(wanted, str):
        experts = {
            f"{w.module}.{old}" for w in shape.weights if w.kind == "experts" for old in names
        }
        modules = {w.module for w in shape.weights} | experts
        return {name.rpartition(".")[2] for name in modules if re.fullmatch(wanted, name)}
    if not settings.target_linear:
        return set(wanted or ())
    if wanted:
        return linear | set(wanted)  # `regrow.tasks.modeling.adapter` names every layer
    leaves = {name.rpartition(".")[2] for name in linear}
    return leaves | (set(names) if settings.layers is None else set())


def _modules(shape: ModelShape) -> Iterator[Weight]:
    """The weights of layers that an adapter can be put on; a tied head is one of them."""
    yield from (w for w in shape.weights if w.kind in ("linear", "embedding"))
    if shape.tied:
        yield Weight("lm_head.weight", (shape.vocabulary, shape.hidden), "linear")


def _is_target(weight: Weight, shape: ModelShape, settings: AdapterSettings) -> bool:
    name, wanted = weight.module, settings.target_modules
    if _ends(name, settings.exclude_modules):
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    in_every_layer = weight.kind == "linear" and name != "lm_head" and settings.target_linear
    if not wanted and not settings.target_linear and not settings.target_parameters:
        wanted = _DEFAULT_TARGETS.get(shape.model_type)
        if wanted is None:
            raise UnknownTargetsError(
                "lora_target_modules: PEFT has no default for "
                f"{shape.model_type!r}; name the layers, or set lora_target_linear: true"
            )
    if not (in_every_layer or _ends(name, wanted)):
        return False
    return settings.layers is None or _layer(name, settings) in settings.layers


def _ends(name: str, wanted: Sequence[str] | str | None) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in wanted or ())


def _layer(name: str, settings: AdapterSettings) -> int | None:
    patterns = [rf".*\.{pattern}\.(\d+)\." for pattern in settings.layers_pattern]
    for pattern in patterns or [r".*\.[^.]*\.(\d+)\."]:
        found = re.match(pattern, name)
        if found:
            return int(found[1])
    return None


def _rank(name: str, settings: AdapterSettings) -> int:
    for pattern, rank in settings.rank_pattern.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return rank
    return settings.r


def _saved(shape: ModelShape, settings: AdapterSettings) -> int:
    """Parameters of `modules_to_save`; a tied end follows the other one."""
    names = settings.modules_to_save
    if shape.tied and {"lm_head", "embed_tokens"} & set(names):
        names = tuple(name for name in names if name != "lm_head")
        names = tuple({*names, "embed_tokens"})
    return sum(
        weight.numel
        for weight in shape.weights
        if any(name in weight.module.split(".") or weight.module.endswith(name) for name in names)
    )


def _token_rows(shape: ModelShape, settings: AdapterSettings) -> int:
    tokens = settings.trainable_tokens
    if isinstance(tokens, Mapping):
        count = sum(len(ids) for ids in tokens.values())
    else:
        count = len(tokens or ())
    return count * shape.hidden
