"""FSDP and DeepSpeed as Axolotl's recipes write them, old and new, in the words of our fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regrow.configs.draft import Draft
from regrow.configs.faults import Notice
from regrow.configs.local_paths import expanded, is_file
from regrow.configs.off_values import taken_truth
from regrow.configs.plain_values import keep_plain_values

_SHIPPED = Path(__file__).parent / "deepspeed"
_MAX_BYTES = 1 << 20
"""DeepSpeed's published files have a kilobyte or two."""

# Of FSDP1 only: FSDP2 does these by itself.
_ONLY_FSDP1 = (
    "limit_all_gathers",
    "sync_module_states",
    "use_orig_params",
    "backward_prefetch",
    "forward_prefetch",
    "final_state_dict_type",
)
OLD_OPTIONS = (*_ONLY_FSDP1, "version", "sharding_strategy", "cpu_offload_pin_memory")
"""Entries of `fsdp_config` that are read here and are not fields."""

_RESHARDS = {"full_shard": True, "shard_grad_op": False}
_HYBRID = {"hybrid_shard": True, "hybrid_shard_zero2": False}


def read_sharding(draft: Draft, directory: Path | None) -> None:
    """Rewrite `fsdp`, `fsdp_version` and `fsdp_config`, and read the file that `deepspeed` names.

    Args:
        directory: the recipe's; None: there is none.
    """
    _by_fsdp(draft)
    _fsdp(draft)
    _deepspeed(draft, directory)
    _ray(draft)


def _ray(draft: Draft) -> None:
    if taken_truth(draft, "use_ray"):
        draft.set(("launcher",), "ray", "`use_ray` is said so here")


def _by_fsdp(draft: Draft) -> None:
    """Expert parallelism, and tensor parallelism beside what it is not combined with here, divide
    weights over processes; here FSDP does, by layers. The result is the same, and each process
    holds as small a part of them."""
    for key in ("expert_parallel_size", "tensor_parallel_size"):
        size = draft.data.get(key)
        if size and key == "tensor_parallel_size" and not _combined(draft):
            return  # a field
        draft.data.pop(key, None)
        if not size or (size == 1 and not isinstance(size, bool)):
            continue
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            draft.fault((key,), "expected a whole number", "Use `fsdp_config`", size)
        elif draft.data.get("deepspeed"):
            why = "under DeepSpeed weights are not divided this way"
            draft.fault((key,), why, "Use `fsdp_config` in the place of `deepspeed`", size)
        else:
            _more_shards(draft, key, size)


def _combined(draft: Draft) -> bool:
    """Whether layers are not divided here beside what else is asked for."""
    copies = ("context_parallel_size", "dp_replicate_size")
    others = _has_fsdp(draft) and any(draft.data.get(key) not in (None, 0, 1) for key in copies)
    return others or bool(draft.data.get("deepspeed"))


def _more_shards(draft: Draft, key: str, size: int) -> None:
    why = "FSDP2 divides weights over as many processes, with the same result"
    draft.notices.append(Notice("renamed", (key,), why, "fsdp_config"))
    if not _has_fsdp(draft):
        draft.data["fsdp_config"], draft.data["fsdp_version"] = {}, 2
    shards = draft.data.get("dp_shard_size")
    if isinstance(shards, int) and not isinstance(shards, bool) and shards > 1:
        draft.set(("dp_shard_size",), shards * size, f"`{key}` divides weights {size} times more")
    elif shards == 1:
        del draft.data["dp_shard_size"]


def _has_fsdp(draft: Draft) -> bool:
    return bool(draft.data.get("fsdp")) or isinstance(draft.data.get("fsdp_config"), dict)


def _fsdp(draft: Draft) -> None:
    data = draft.data
    listed, config = data.pop("fsdp", None), data.get("fsdp_config")
    if config is not None and not isinstance(config, dict):
        return  # the check of types says it
    if not listed and not config and config != {}:
        data.pop("fsdp_config", None)
        version = _number(data.get("fsdp_version"))
        if version in (1, 2) and not isinstance(version, bool):
            data["fsdp_version"] = 2  # of no effect, which is told
        return
    if config is None:
        config = data["fsdp_config"] = {}
    for name in [name for name in config if name.startswith("fsdp_")]:
        _without_prefix(draft, config, name)
    _version(draft, config)
    if not isinstance(listed, (str, list, type(None))):
        draft.fault(("fsdp",), "expected a list", "Use `fsdp_config: {}`", listed)
        listed = None
    words = listed.split() if isinstance(listed, str) else list(listed or ())
    _old_words(draft, config, words)
    dropped = [name for name in _ONLY_FSDP1 if name in config]
    for name in dropped:
        del config[name]
        draft.ignore(f"fsdp_config.{name}", "FSDP2 does it by itself")
    if config.pop("cpu_offload_pin_memory", None) is not None:
        draft.ignore("fsdp_config.cpu_offload_pin_memory", "offloaded weights are always pinned")
    layers = config.get("transformer_layer_cls_to_wrap")
    if isinstance(layers, str):
        config["transformer_layer_cls_to_wrap"] = [name.strip() for name in layers.split(",")]


def _without_prefix(draft: Draft, config: dict[str, Any], name: str) -> None:
    """Both spellings of an entry at once must agree."""
    short = name.removeprefix("fsdp_")
    if config.get(short, config[name]) != config[name]:
        why = f"`fsdp_config.{short}` says otherwise"
        draft.fault(("fsdp_config", name), why, f"Keep `{short}` only")
        del config[name]
        return
    draft.move(("fsdp_config", name), ("fsdp_config", short), config[name])


def _version(draft: Draft, config: dict[str, Any]) -> None:
    """Axolotl takes version 1 where none is given."""
    inside = _number(config.pop("version", None))
    version = _number(draft.data.get("fsdp_version", inside or 1))
    if inside is not None and inside != version:
        why = f"`fsdp_config` says version {inside}"
        draft.fault(("fsdp_version",), why, "Keep `fsdp_version: 2` only")
    if version == 1 and not isinstance(version, bool):
        why = "FSDP version 1 is gone from the libraries; version 2 computes the same"
        draft.notices.append(Notice("set", ("fsdp_version",), why, 2))
        version = 2
    draft.data["fsdp_version"] = version


def _number(version: Any) -> Any:
    """1 and 2 may be written as text."""
    return {"1": 1, "2": 2}.get(version, version) if isinstance(version, str) else version


def _old_words(draft: Draft, config: dict[str, Any], words: list[Any]) -> None:
    """The list `fsdp`, and version 1's `sharding_strategy`."""
    strategy = config.pop("sharding_strategy", None)
    for word in [*words, *([strategy] if strategy is not None else [])]:
        name = str(word).lower()
        if name in _RESHARDS:
            config.setdefault("reshard_after_forward", _RESHARDS[name])
        elif name in _HYBRID:
            config.setdefault("reshard_after_forward", _HYBRID[name])
            if draft.data.get("dp_replicate_size", 1) == 1:
                why = f"{word} shards within a machine and copies between machines"
                remedy = "Use `full_shard` with `dp_replicate_size`, the number of machines"
                draft.fault(("fsdp_config",), why, remedy, word)
        elif name == "offload":
            config.setdefault("offload_params", True)
        elif name == "no_shard":
            why = "no_shard gives every process the whole model"
            draft.fault(("fsdp_config",), why, "Remove `fsdp` and `fsdp_config`", word)
        elif name != "auto_wrap":
            draft.fault(("fsdp_config",), "FSDP has no such option", "Remove it", word)


def shipped_deepspeed() -> list[str]:
    """Names of the DeepSpeed configurations that come with Regrow."""
    return sorted(path.name for path in _SHIPPED.glob("*.json"))


def _deepspeed(draft: Draft, directory: Path | None) -> None:
    """A path becomes the file's content, so that the recipe that is recorded says all."""
    given = draft.data.get("deepspeed")
    if not given:
        draft.data.pop("deepspeed", None)
        return
    if not isinstance(given, str):
        return
    places = [expanded(given)]
    if directory is not None:
        places.insert(0, directory / given)
    path = next((place for place in places if is_file(place)), None)
    if path is None and Path(given).name in shipped_deepspeed():
        path = _SHIPPED / Path(given).name
        why = f"{path.name} comes with Regrow"
        draft.notices.append(Notice("note", ("deepspeed",), why))
    if path is None:
        names = ", ".join(shipped_deepspeed())
        draft.fault(("deepspeed",), "there is no such file", f"Write it, or use one of {names}")
        del draft.data["deepspeed"]
        return
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("it is larger than a megabyte")
        draft.data["deepspeed"] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        draft.fault(("deepspeed",), f"{path} cannot be read as JSON: {error}", "Correct it")
        del draft.data["deepspeed"]
        return
    keep_plain_values(draft)  # JSON readers take NaN, too
