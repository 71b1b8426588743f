"""Loads a model and a tokenizer from a local directory, with errors a person can act on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)
from transformers import logging as transformers_logging
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from regrow.configs.facts import SEPARABLE_LAYERS, STATEFUL
from regrow.tasks.modeling import attention as packed
from regrow.tasks.modeling import gptq, side_by_side
from regrow.tasks.modeling.quantization import Quantization, require_package
from regrow.tasks.stage import StageError

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Names of dtypes in specs."""


def load_model(
    path: str | Path,
    *,
    dtype: str,
    attention: str = packed.NAME,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
    tensor_parallel_size: int = 1,
    fsdp_size: int = 1,
) -> PreTrainedModel:
    """The causal language model in `path`, on the CPU, weights in `dtype`.

    One that is stored in FP8, MXFP4 or GPTQ is dequantized to `dtype`.

    Args:
        dtype: a name in `DTYPES`.
        quantization: hold the linear layers in 4 or 8 bits (on the GPU, where there is one).
        attention: "regrow_packed" for packed rows, "sdpa" for generation and padded batches.
        tensor_parallel_size: above 1, this process holds a part of each layer only, on its own
            device, by Transformers' plan for the architecture; all processes call it together.
        fsdp_size: beside it, groups of such processes, over which FSDP2 shards those parts.

    Raises:
        StageError: a file is missing, the architecture is unknown, weights do not fit the
            architecture, the model cannot be trained on packed rows, or it is stored in a
            quantization that cannot be trained.
    """
    transformers_logging.disable_progress_bar()  # stages tell how far they are in their own way
    directory = _model_directory(path)
    config, runs = _usable_config(directory, trust_remote_code, attention)
    own = quantization and quantization.config(divided=tensor_parallel_size > 1)
    weights = _read_gptq(config, directory)
    quantized = own or _stored_quantization(config, directory)
    model = _read_model(
        directory,
        weights,
        config=config,
        **({"quantization_config": quantized} if quantized else {}),
        **_divided(tensor_parallel_size, fsdp_size),
        dtype=DTYPES[dtype],
        attn_implementation=runs,
        trust_remote_code=trust_remote_code,
    )
    _settle(model, attention, runs, directory)
    if own:
        _keep_gradients(model)
    elif quantized:
        _forget_form(model)
    return model


def _read_model(
    directory: Path, weights: dict[str, torch.Tensor] | None, *, config: Any, **options: Any
) -> Any:
    """The model in the directory, or of its config and `weights`."""
    # The automatic class wants a place.
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] if weights else AutoModelForCausalLM
    try:
        model, report = kind.from_pretrained(
            None if weights else directory,
            config=config,
            state_dict=weights,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (ValueError, OSError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise StageError(f"the model in {directory} cannot be loaded: {error}") from error
    _check_weights(report, directory)
    if weights:
        _use_generation_config(model, directory)
    return model


def _forget_form(model: Any) -> None:
    """Transformers keeps how it read the weights and, when it saves the model, would quantize those
    anew that it has dequantized, without a word of it in config.json (5.23)."""
    vars(model).pop("_weight_conversions", None)  # absent in 5.17


def _keep_gradients(model: PreTrainedModel) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes' 4-bit layers change their form in a validation and
    keep it when training goes on, where that form gives wrong gradients without a word (0.50)."""
    for layer in cast(Any, model).modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def random_model(
    path: str | Path, seed: int, attention: str = packed.NAME, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model in `path` with fresh random weights in float32: the same for one seed.

    Raises:
        StageError: as `load_model`.
    """
    directory = _model_directory(path)
    config, runs = _usable_config(directory, trust_remote_code, attention)
    transformers.set_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config,
        dtype=torch.float32,
        attn_implementation=runs,
        trust_remote_code=trust_remote_code,
    )
    _use_generation_config(model, directory)
    _settle(model, attention, runs, directory)
    return model


def empty_model(
    path: str | Path,
    *,
    vocabulary: int | None = None,
    attention: str = packed.NAME,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in `path` without its weights: parameters on torch's meta device, buffers real.

    Args:
        vocabulary: rows of its embeddings; None: as the model has.

    Raises:
        StageError: as `load_model`.
    """
    directory = _model_directory(path)
    config, runs = _usable_config(directory, trust_remote_code, attention)
    if vocabulary is not None:
        config.get_text_config().vocab_size = vocabulary
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=runs,
            trust_remote_code=trust_remote_code,
        )
    model.tie_weights()  # the empty parameters were made one by one
    _use_generation_config(model, directory)
    _settle(model, attention, runs, directory)
    return model


def _use_generation_config(model: PreTrainedModel, directory: Path) -> None:
    """The file's, which comes with the weights only where Transformers reads them."""
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)


def _divided(tensor_parallel_size: int, fsdp_size: int) -> dict[str, Any]:
    if tensor_parallel_size == 1:
        return {}
    # Of many processes only.
    from transformers.distributed.configuration_utils import DistributedConfig

    groups: dict[str, Any] = {"fsdp_size": fsdp_size} if fsdp_size > 1 else {}
    return {"distributed_config": DistributedConfig(tp_size=tensor_parallel_size, **groups)}


def _usable_config(directory: Path, trust_remote_code: bool, attention: str) -> tuple[Any, str]:
    """The configuration, and the attention that computes what `attention` asks for."""
    config = _load_config(directory, trust_remote_code)
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    plain = "sdpa" if getattr(known, "_supports_sdpa", True) else "eager"
    if attention != packed.NAME:
        return config, plain if attention == "sdpa" else attention
    packed.register()
    others = _inseparable_layers(config)
    # Of what torch's attention has not, ours has the soft cap (Gemma 2).
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if not others and (capped or plain == "sdpa"):
        return config, attention
    logger.info(
        "%s: examples are padded and computed side by side, with the attention %s, since the model "
        "has %s",
        directory.name,
        plain,
        ", ".join(others) or "an attention of its own kind",
    )
    return config, plain


def _settle(model: PreTrainedModel, wanted: str, runs: str, directory: Path) -> None:
    """Packed examples are kept apart, one way or the other."""
    if wanted == packed.NAME != runs:
        side_by_side.attach(model)
    _check_replaceable(model, runs, directory)


def _check_replaceable(model: PreTrainedModel, attention: str, directory: Path) -> None:
    if attention == packed.NAME and not type(model).is_backend_compatible():
        raise StageError(
            f"{type(model).__name__} in {directory} does not let Regrow replace its attention, so "
            "packed examples would see each other; choose a model of a newer architecture"
        )


def stored_quantization(config: Any) -> str | None:
    """How the weights are quantized in their files ("fp8", "gptq", ...), by their config.json."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else found
    return str(getattr(method, "quant_method", method)) if found else None


def _read_gptq(config: Any, directory: Path) -> dict[str, torch.Tensor] | None:
    """The plain weights of a model stored as GPTQ, whose configuration forgets it; else None."""
    if stored_quantization(config) != "gptq":
        return None
    weights = gptq.plain_weights(directory, config.quantization_config)
    del config.quantization_config
    return weights


def _stored_quantization(config: Any, directory: Path) -> Any:
    """What makes Transformers dequantize the stored weights; None where they are plain."""
    method = stored_quantization(config)
    if method is None:
        return None
    dequantizing = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
    if method not in dequantizing:
        raise StageError(
            f"base_model: the weights in {directory} are stored quantized ({method}); an adapter "
            "trained on them could not be merged back. Use the unquantized model, with "
            "`adapter: qlora` where memory is short"
        )
    if method == "mxfp4":
        require_package("accelerate", "accelerate", "base_model")
    settings = {k: v for k, v in dict(config.quantization_config).items() if k != "quant_method"}
    return getattr(transformers, dequantizing[method])(**settings | {"dequantize": True})


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in `path`.

    Raises:
        StageError: there is none, or it cannot be read.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise StageError(f"there is no tokenizer directory {directory}")
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, ImportError, KeyError, TypeError) as error:
        raise StageError(f"the tokenizer in {directory} cannot be loaded: {error}") from error


def grow_embeddings(model: PreTrainedModel, num_tokens: int) -> int:
    """Give the model an embedding for every token id below `num_tokens`; returns how many are new.

    A new embedding is the mean of the old ones (Hewitt 2021, "Initializing new word embeddings
    for pretrained language models"): no random numbers, so that merging finds the same ones.
    """
    embedding: Any = model.get_input_embeddings()
    old: int = embedding.weight.shape[0]
    if num_tokens <= old:
        return 0
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                weight: Any = layer.weight
                weight.copy_(with_new_rows(weight[:old], num_tokens))
    return num_tokens - old


def with_new_rows(weight: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """An embedding [old, D] grown to [num_tokens, D], the new rows the mean of the old ones."""
    mean = weight.float().mean(dim=0).to(weight.dtype)
    return torch.cat([weight, mean.expand(num_tokens - len(weight), -1)])


def _model_directory(path: str | Path) -> Path:
    directory = Path(path)
    if not directory.is_dir():
        raise StageError(f"base_model: there is no directory {directory}")
    if not (directory / "config.json").is_file():
        raise StageError(f"base_model: {directory} has no config.json, so it is no model directory")
    if not list(directory.glob("*.safetensors")):
        found = sorted(file.name for file in directory.iterdir() if file.suffix in {".bin", ".pt"})
        pickles = f" ({', '.join(found)} are pickles, which are not opened)" if found else ""
        raise StageError(
            f"base_model: {directory} holds no *.safetensors{pickles}; "
            "convert the weights to safetensors first"
        )
    return directory


def _load_config(directory: Path, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise StageError(
            f"the config.json in {directory} is not of an architecture that this Transformers "
            f"knows (a newer version may): {error}"
        ) from error


def _inseparable_layers(config: Any) -> list[str]:
    text = config.get_text_config()
    others = {str(layer) for layer in getattr(text, "layer_types", None) or ()} - SEPARABLE_LAYERS
    others |= {name for name in STATEFUL if getattr(text, name, None)}
    return sorted(others)


def _check_weights(report: dict[str, Any], directory: Path) -> None:
    """Weights that are missing would be random numbers, in silence."""
    missing = sorted(str(key) for key in report.get("missing_keys", ()))
    wrong = sorted(str(key) for key in report.get("mismatched_keys", ()))
    for what, names in (("lack", missing), ("have the wrong shape for", wrong)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise StageError(
                f"the weights in {directory} {what} {', '.join(names[:3])}{more}; "
                "the files do not belong to this config.json, or are incomplete"
            )
    unused = sorted(str(key) for key in report.get("unexpected_keys", ()))
    if unused:
        logger.warning("%d weights in %s are not used: %s", len(unused), directory, unused[:3])
