"""Placement: on how many processes training runs, how they share it, where artifacts are kept."""

from __future__ import annotations

from typing import Any, Literal

from regrow.configs.kernels import KernelName
from regrow.configs.sections.section import Count, Gib, NotNegative, Positive, Section, Texts, Whole


class FsdpConfig(Section):
    """How FSDP2 shards a model. The loss is the same as without it."""

    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward pass: least memory. False keeps them for
    the backward pass: more memory, less traffic. Default true."""

    offload_params: bool = False
    """Keep weights and optimizer in the host's memory between uses. Default false."""

    activation_checkpointing: bool = False
    """The same as `gradient_checkpointing: true`, in whose place it is. Default false."""

    auto_wrap_policy: Literal["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"] = (
        "TRANSFORMER_BASED_WRAP"
    )
    """What is gathered at a time: a layer, or all. Default: a layer. SIZE_BASED_WRAP, so many
    parameters, is refused."""

    transformer_layer_cls_to_wrap: Texts = ()
    """Classes of the layers. Default: those that the model names itself."""

    min_num_params: Whole = 0
    """Of no effect: it is for SIZE_BASED_WRAP."""

    cpu_ram_efficient_loading: bool = False
    """Take the weights of one process for all of them when sharding. Default false: each process
    uses those that it read."""

    state_dict_type: Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT", "LOCAL_STATE_DICT"] = (
        "SHARDED_STATE_DICT"
    )
    """Of no effect: checkpoints are always sharded and fit any number of processes, and the result
    is always whole."""

    mixed_precision_policy: str | None = None
    """Of no effect: weights travel in the type they are held in, and are computed with as on one
    GPU, so that the loss is the same."""


class ParallelSection(Section):
    """Where and how fast, never what."""

    num_processes: Count | None = None
    """Training processes on each machine. Default: one for each GPU, or 1."""

    launcher: Literal["torchrun", "ray"] = "torchrun"
    """What starts training processes: torchrun, on this machine and on those that its environment
    names (see the README on several machines); or workers of an existing Ray cluster. Default
    torchrun."""

    ray_num_workers: Count | None = None
    """With `launcher: ray`: workers, each of which runs `num_processes` (by default one for each of
    its GPUs). Default: one for each machine of the cluster."""

    resources_per_worker: dict[str, NotNegative] = {"GPU": 1}
    """With `launcher: ray`: what Ray reserves for each worker, in Ray's names. Default one GPU."""

    store: str | None = None
    """Root URL of the artifact store: a directory, `s3://`, `gs://`, `az://`, ... Default: the
    setting of the installation."""

    kernels: Literal["auto", "off"] | tuple[Literal["auto"] | KernelName, ...] = "auto"
    """Which of Regrow's kernels compute the model: `auto`, all of them on a GPU and none elsewhere;
    `off`; or a list of `attention` (Q, K, V and output with LoRA, rotary embedding), `mlp` (the
    gated MLP with LoRA), `experts`, `rms_norm` and `cross_entropy` (the head on supervised tokens
    alone), which then run on any device; with `auto` before them, on a GPU alone. The result is the
    same up to rounding. Default `auto`."""

    deepspeed: dict[str, Any] | None = None
    """DeepSpeed's configuration: in place, as the path of a JSON file, or as the name of one that
    comes with Regrow (zero1.json, zero2.json, zero3.json, zero3_bf16.json, ...). The result is the
    same as without it up to rounding."""

    fsdp_version: Literal[2] | None = None
    """Version of FSDP: 2. Recipes written for version 1 are read as version 2."""

    fsdp_config: FsdpConfig | None = None
    """Shard weights, gradients and optimizer over the processes with FSDP2; `{}` takes its
    defaults. Default: every process holds the whole model."""

    dp_replicate_size: Count = 1
    """With FSDP2: copies of the model, each of them sharded over the processes of its own (one copy
    for each machine, say). Default 1."""

    dp_shard_size: Count | None = None
    """With FSDP2: processes over which one copy is sharded. Default: all of them, divided by
    `dp_replicate_size`."""

    context_parallel_size: Count = 1
    """Processes that share each row (context parallelism): each computes a part of its tokens, and
    attention reaches the others' keys, so that rows may be as many times longer. Examples packed
    into a row stay apart, and the loss is the same. With DDP, FSDP2 and DeepSpeed. Default 1."""

    tensor_parallel_size: Count = 1
    """Processes that each hold a part of every layer and compute it together, on GPUs: all
    processes of the training (tensor parallelism, by Transformers' plan for the architecture), for
    full training, LoRA and QLoRA in 4 bits. With `fsdp_config`, groups of so many: each reads rows
    of its own, and FSDP2 shards the parts over the groups, for full training and LoRA
    (`dp_shard_size` is their number). Our kernels are off. Default 1."""

    gpu_memory_limit: Gib | None = None
    """Of each GPU's memory training fills no more than so many GiB; as text with a unit, too:
    `17GiB`, `16000MiB`, `18GB`, `18000MB`. `gradient_checkpointing: auto` keeps to it, and
    `regrow plan` counts with it; CUDA's own memory, under 1 GiB, is beside it. Default: all."""

    time_limit: Positive | None = None
    """Minutes after which training saves a checkpoint and ends; the next run goes on from there.
    Default: none."""

    hang_timeout: Positive | None = 30.0
    """Minutes without any step after which a training process counts as hanging: the stacks of all
    threads are written to the log and training goes on from the newest checkpoint. Default 30."""

    max_restarts: Whole = 3
    """How often training that died is started again without a new checkpoint in between. Default
    3, torchrun's example."""

    auto_find_batch_size: bool = True
    """When memory runs out, go on with half the `micro_batch_size` and twice the accumulation,
    which gives the same result. Default true."""
