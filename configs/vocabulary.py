"""Axolotl's keys that are not fields here: renamed, accepted without effect, or refused, and why.

A refused key is accepted while it is off: null, false, 0, empty, or a value in OFF.
Source of the names: Axolotl 0.18's schemas and the YAML files it publishes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regrow.configs.kernels import all_words


@dataclass(frozen=True)
class Renamed:
    """The key has another name here."""

    to: str
    why: str = "that is its name now"


@dataclass(frozen=True)
class Ignored:
    """The key is accepted and does nothing."""

    why: str


@dataclass(frozen=True)
class Refused:
    """The key asks for something that would not happen."""

    why: str
    remedy: str = "Remove it"


Word = Renamed | Ignored | Refused

_RENAMED = {
    "dataset_processes": Renamed("dataset_num_proc"),
    "evaluation_strategy": Renamed("eval_strategy"),
    "noisy_embedding_alpha": Renamed("neftune_noise_alpha"),
    "model_revision": Renamed("revision_of_model"),
    "type_of_model": Renamed("model_type"),
    "sequence_parallel_degree": Renamed("context_parallel_size"),
    "context_parapllel_size": Renamed("context_parallel_size", "it is misspelt"),
    "wandb_run_name": Renamed("wandb_name", "Axolotl has no such key and would ignore it"),
    "adam_eps": Renamed("adam_epsilon", "Axolotl has no such key and would ignore it"),
    "eval_table_max_new_tokens": Renamed("eval_max_new_tokens"),
    "relora_steps": Renamed("jagged_restart_steps"),
    "relora_warmup_steps": Renamed("jagged_restart_warmup_steps"),
    "relora_anneal_steps": Renamed("jagged_restart_anneal_steps"),
}

_IGNORED = {
    "MLflow records every run": """
        use_mlflow use_otel_metrics otel_metrics_host otel_metrics_port""",
    "models are kept in the artifact store, and their places are in MLflow": """
        hf_mlflow_log_artifacts wandb_log_model swanlab_log_model""",
    "Transformers' reporter does not take it; set the reporter's own environment variables": """
        comet_experiment_config swanlab_description swanlab_log_completions
        swanlab_completion_log_interval swanlab_completion_max_buffer""",
    "Regrow chooses its kernels itself": """
        liger_rms_norm_gated liger_layer_norm chunked_cross_entropy_num_chunks
        lora_embedding_kernel flash_attn_d512 flash_optimum fused_attn_kernel use_kernels
        use_scattermoe use_sonicmoe
        use_dsv4_kernels use_glm_dsa_kernels expert_backend experts_implementation
        moe_grouped_backend moe_dequant_chunk_size moe_bnb_fast mlp_kernel large_head_attention
        sdpa_varlen gemma4_hybrid_attn_impl flex_attn_compile_kwargs tiled_mlp
        tiled_mlp_num_shards tiled_mlp_use_original_mlp dsv4_fp8_lora_kernel
        dsv4_shared_mlp_lora_kernel""",
    "restarts merge nothing: what was learnt stays beside the base": "relora_cpu_offload",
    "a run resumes by itself where it stopped": """
        auto_resume_from_checkpoints save_only_model save_first_step dynamic_checkpoint""",
    "it saves memory only, and is not here yet": """
        layer_offloading low_cpu_mem_usage
        lora_on_cpu dataset_keep_in_memory embeddings_skip_upcast""",
    "torch gives memory that it holds back by itself before it runs out of it": """
        gc_steps torch_empty_cache_steps gc_collect_steps""",
    "FSDP sends weights in the type they are held in": "fp8_enable_fsdp_float8_all_gather",
    "FSDP divides experts as it does all weights": """
        expert_parallel_backend expert_parallel_num_nvl_bytes expert_parallel_num_rdma_bytes
        expert_parallel_token_capacity expert_parallel_fallback_on_unsupported""",
    "keys and values are gathered at once: every such way gives the same result": """
        heads_k_stride ring_attn_func""",
    "Regrow places a run on its devices itself": """
        device device_map world_size local_rank ddp ddp_timeout ddp_bucket_cap_mb
        ddp_broadcast_buffers ddp_find_unused_parameters accelerator_config ray_run_name
        max_memory experimental_skip_move_to_device qlora_sharded_model_loading""",
    "it changes speed only, and is not here yet": """
        torch_compile torch_compile_backend torch_compile_mode torch_compile_options deepcompile
        dataloader_pin_memory dataloader_num_workers dataloader_prefetch_factor
        profiler_steps profiler_steps_start""",
    "every report has the tokens a second": "include_tokens_per_second include_tkps",
    "prepared data is kept in the artifact store": """
        dataset_prepared_path num_dataset_shards_to_save push_dataset_to_hub""",
    "every run prepares its data, and finds what is prepared already": "skip_prepare_dataset",
    "Regrow packs rows its own way, without padding": """
        sample_packing_group_size sample_packing_bin_size
        sample_packing_mp_start_method sample_packing_eff_est sample_packing_seq_len_multiplier
        total_num_tokens total_supervised_tokens multipack_real_batches batch_flattening
        pad_to_multiple_of pretrain_multipack_buffer_size
        streaming_multipack_buffer_size dataloader_drop_last""",
    "attention is always kept inside each example": "pretrain_multipack_attn",
    "the model's and the tokenizer's own files decide it": """
        cls_model_config tokenizer_use_fast tokenizer_legacy tokenizer_save_jinja_files
        base_model_ignore_patterns is_falcon_derived_model is_llama_derived_model
        is_mistral_derived_model is_qwen_derived_model lora_fan_in_fan_out""",
    "`bf16` decides the type, as in Axolotl": "torch_dtype",
    "a base stored as GPTQ is known by its config.json and dequantized when it is loaded": """
        gptq gptq_groupsize gptq_model_v1 gptq_disable_exllama""",
    "the embedding grows by the new tokens only": "resize_token_embeddings_to_32x",
    "answers are generated by the evaluate stage: see eval_prompts and eval_table_size": """
        generate_samples num_generation_samples generation_max_new_tokens generation_temperature
        generation_top_p generation_top_k generation_prompt_ratio generation_do_sample""",
    "the result is always whole": "fsdp_final_state_dict_type",
    "weights are only ever written as safetensors": "save_safetensors",
    "rows are never padded but where `pad_to_sequence_len` asks for it": """
        collator_pad_to_longest""",
    "neither Axolotl nor Regrow reads it: `seed` orders the data": "data_seed",
    "merging is a stage of every run with an adapter": "merge_lora merge_method",
    "the Hugging Face token is taken from the environment": "hf_use_auth_token",
    "adapters are always float32, and tied weights are kept tied": """
        peft_autocast_adapter_dtype peft_ensure_weight_tying""",
    "training with `rl` or a reward model, which it belongs to, is not here yet": """
        trl vllm rl_beta dpo_beta dpo_use_weighting dpo_label_smoothing dpo_loss_type
        dpo_loss_weights dpo_use_liger_kernel dpo_padding_free dpo_use_logits_to_keep
        dpo_generate_during_eval dpo_norm_loss rpo_alpha precompute_ref_log_probs orpo_alpha
        simpo_gamma cpo_alpha kto_desirable_weight kto_undesirable_weight max_prompt_len
        rl_adapter_ref_model
        num_labels center_rewards_coefficient""",
    "it matters to Axolotl's own working only": """
        strict debug remove_unused_columns torchdistx_path is_preprocess
        preprocess_iterable axolotl_config_path test_value full_finetune gradio_title gradio_share
        gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature""",
}

_NOT_YET = "{} is not here yet"

_REFUSED: dict[tuple[str, str], str] = {
    (
        _NOT_YET.format("energy-based fine-tuning"),
        "Remove it to fine-tune on answers",
    ): "ebft",
    (_NOT_YET.format("training on images or audio"), "Remove it to fine-tune on text"): """
        processor_type processor_kwargs image_size image_resize_algorithm role_boundaries
        freeze_mm_modules""",
    (
        "Regrow keeps attention inside each document",
        "Remove it",
    ): "pretraining_sample_concatenation",
    (
        "a base stored in FP8 is dequantized when it is loaded, none in NVFP4 is read, and the "
        "kernels that train on such weights need one kind of GPU each",
        "Use `adapter: qlora` with `quantize_moe_experts`",
    ): """
        nonexpert_quantization dsv4_fp8_nonexpert_mode dsv4_fp4_grouped_mode dsv4_bf16_all
        gemma4_fp8_nonexpert gemma4_nf4_nonexpert nvfp4_merge_aware nvfp4_merge_aware_start_step""",
    (
        "weights of 1.58 bits are another kind of result, which no later stage here reads",
        "Remove it to train the weights in `bf16`",
    ): "use_onebitllms",
    (_NOT_YET.format("quantization-aware training or quantizing afterwards"), "Remove it"): """
        qat quantization llmcompressor""",
    (_NOT_YET.format("keeping norms in float32 under FSDP"), "Remove it"): """
        fp32_norms fp32_norm_classes""",
    (_NOT_YET.format("this choice of trained weights"), "Use `unfrozen_parameters`"): """
        lisa_n_layers lisa_step_interval lisa_layers_attribute spectrum_top_fraction
        spectrum_model_name fix_untrained_tokens""",
    (_NOT_YET.format("this kind of adapter"), "Use plain LoRA"): """
        peft_layer_replication mora""",
    (_NOT_YET.format("this optimizer or learning rate"), "See `optimizer` and `lr_scheduler`"): """
        dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of qgalore_rank
        qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant
        qgalore_proj_bits qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj
        qgalore_queue_size grokfast_alpha grokfast_lamb""",
    (_NOT_YET.format("this training method"), "Remove it"): """
        trainer_cls diffusion dense_mixer use_eaft eaft_alpha eaft_k use_pose
        pose_split_on_token_ids pose_max_context_len pose_num_chunks
        liger_use_token_scaling kd_trainer kd_ce_alpha kd_alpha kd_temperature kd_temperature_min
        kd_beta kd_normalize_topk kd_online_server kd_online_server_base_url kd_online_topk
        kd_online_timeout hatchery nemo_gym_enabled nemo_gym_dir nemo_gym_auto_clone
        nemo_gym_config_paths nemo_gym_head_port nemo_gym_server_timeout nemo_gym_verify_timeout
        nemo_gym_run_timeout nemo_gym_datasets nemo_gym_auto_start nemo_gym_model_name
        nemo_gym_multi_turn nemo_gym_max_turns""",
    (_NOT_YET.format("changing the model's configuration or weights"), "Remove it"): """
        overrides_of_model_config overrides_of_model_kwargs model_config model_kwargs
        shrink_embeddings mean_resizing_embeddings llama4_linearized_experts
        scaling_softmax scaling_softmax_factor scaling_softmax_bias rope_scaling s2_attention""",
    (_NOT_YET.format("this evaluation"), "Remove it; `eval_prompts` shows answers"): """
        do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset bench_split
        lm_eval_tasks lm_eval_batch_size lm_eval_post_train lm_eval_model""",
    (_NOT_YET.format("this way of reading chats"), "Put it into the chat template"): """
        added_tokens_overrides""",
    (
        "a run goes on by itself where it stopped, and cannot go on from a checkpoint of elsewhere",
        "Remove it; to begin with an adapter use `lora_model_dir`, with weights `base_model`",
    ): "resume_from_checkpoint",
    (_NOT_YET.format("choosing a branch on the hub"), "Remove it"): "hub_revision",
    ("secrets do not belong into a recipe, which is recorded", "Remove it"): """
        comet_api_key wandb_api_key swanlab_api_key swanlab_lark_webhook_url swanlab_lark_secret""",
    ("it belongs to Axolotl's file for its cloud, not to a recipe", "Remove it"): """
        provider project_name gpu gpu_count node_count memory memory_preprocess timeout
        timeout_preprocess branch dockerfile_commands secrets volumes env""",
}

WORDS: dict[str, Word] = {
    **_RENAMED,
    **{name: Ignored(why) for why, names in _IGNORED.items() for name in names.split()},
    **{name: Refused(*reason) for reason, names in _REFUSED.items() for name in names.split()},
}
"""Key -> what becomes of it."""

_DATASET_REFUSED = {
    (_NOT_YET.format("this way of reading examples"), "Change the data beforehand"): """
        field_human field_model input_transform input_format logprobs_field temperature""",
}

READ_OTHERWISE: dict[str, str] = {
    **dict.fromkeys(("bfloat16", "float32", "fp16", "float16"), "read as `bf16`"),
    **dict.fromkeys(
        (
            *("flash_attention", "xformers_attention", "sdp_attention", "flex_attention"),
            *("sage_attention", "eager_attention"),
        ),
        "read as `attn_implementation`, which is Regrow's packed attention in any case",
    ),
    **dict.fromkeys(all_words(), "read as `kernels`"),
    "plugins": "Axolotl's plugins for kernels need not be loaded; others are refused by name",
    "pretraining_dataset": "read as `datasets` with `type: completion`, and `streaming`",
    "activation_offloading": "beside `gradient_checkpointing` read as its value `offload`",
    "selective_checkpointing": "beside `gradient_checkpointing` read as its value `selective`",
    "push_to_hub": "true is what `hub_model_id` says anyway; false takes that away",
    "max_packed_sequence_len": "read as `sample_packing` with `sequence_len`",
    "eta_min": "read as `cosine_min_lr_ratio`",
    **dict.fromkeys(
        ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"),
        "read as entries of `bnb_config_kwargs`",
    ),
    "fsdp": "a list such as [full_shard, auto_wrap], read as `fsdp_config`",
    **dict.fromkeys(
        ("model_config", "overrides_of_model_config"),
        "{output_router_logits, router_aux_loss_coef} are keys here; others are refused",
    ),
    "use_ray": "read as `launcher: ray`",
    "tensor_parallel_size": "beside `fsdp_config` with `dp_replicate_size` or "
    "`context_parallel_size`, read as so many more shards",
    "expert_parallel_size": "read as `fsdp_config`, with as many more shards",
    "eval_causal_lm_metrics": "[perplexity], which is always taken; others are refused",
    "do_causal_lm_eval": "accepted beside `eval_causal_lm_metrics: [perplexity]`",
}
"""Keys that phase 1 reads in a way of its own, each with a notice: what it makes of them."""

DATASET_READ_OTHERWISE: dict[str, str] = {
    "message_field_role": "read as `message_property_mappings.role`",
    "message_field_content": "read as `message_property_mappings.content`",
    "field_thinking": "read as an entry of `message_property_mappings`",
    "field_human": "for the removed type sharegpt: the name of the user's role",
    "field_model": "for the removed type sharegpt: the name of the assistant's role",
}
"""The same for an entry of `datasets`."""

DATASET_WORDS: dict[str, Word] = {
    "preprocess_shards": Ignored("data is always prepared in parts"),
    "text_column": Renamed("field"),
    "train_on_split": Refused("Axolotl and Regrow do not read it", "Use `split`"),
    **{
        name: Refused(*reason)
        for reason, names in _DATASET_REFUSED.items()
        for name in names.split()
    },
}
"""The same for the keys of an entry of `datasets` or `test_datasets`."""

_NO_OPTIMIZER = {
    "it changes weights during the backward pass, where gradients cannot be clipped, and keeps no "
    "state that a checkpoint could hold": """
        lomo adalomo galore_adamw_layerwise galore_adamw_8bit_layerwise
        galore_adafactor_layerwise apollo_adamw_layerwise""",
    "a training with it does not resume exactly (measured with grokadamw 0.1.2)": "grokadamw",
    "it needs a package that Regrow does not use": """
        adamw_anyprecision dion sinkgd adopt_adamw q_galore_adamw8bit flash_adamw flash_adam
        flash_sgd flash_sgdw flash_lion""",
}

RENAMED_VALUES: dict[str, dict[str, tuple[str, str]]] = {
    "optimizer": {
        "adamw_hf": ("adamw_torch", "Transformers has taken its own AdamW out for torch's"),
    },
}
"""Values of fields that have another name now: (the name, why)."""

REFUSED_VALUES: dict[str, dict[str, Refused]] = {
    "rl": {"ebft": Refused("energy-based fine-tuning is not here yet", "Use another method")},
    "optimizer": {
        name: Refused(why, "Use adamw_torch_fused")
        for why, names in _NO_OPTIMIZER.items()
        for name in names.split()
    },
    "adapter": dict.fromkeys(
        ("llama-adapter", "mora"), Refused("this kind of adapter is not here yet", "Use lora")
    ),
}
"""Values of fields that Axolotl knows and Regrow does not do."""

OFF: dict[str, tuple[Any, ...]] = {}
"""Further values at which a refused key asks for nothing."""

PLUGINS: dict[str, Word] = {
    **{
        f"axolotl.integrations.{name}": Ignored("Regrow chooses its kernels itself")
        for name in (
            "cut_cross_entropy.CutCrossEntropyPlugin",
            "liger.LigerPlugin",
            "kernels.KernelsPlugin",
        )
    },
    "axolotl.integrations.swanlab.SwanLabPlugin": Ignored("`use_swanlab` is enough"),
    "axolotl.integrations.expert_parallel.ExpertParallelPlugin": Ignored(
        "FSDP divides experts as it does all weights"
    ),
}
"""Entries of `plugins`; any other is refused."""


ANYWAY: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            *("use_mlflow", "auto_resume_from_checkpoints", "include_tokens_per_second"),
            *("include_tkps", "pretrain_multipack_attn", "tokenizer_use_fast", "merge_lora"),
            *("tokenizer_save_jinja_files", "save_safetensors", "hf_use_auth_token"),
            *("peft_autocast_adapter_dtype", "peft_ensure_weight_tying", "sdpa_varlen"),
        ),
        (True,),
    ),
    # Whatever is written is not what decides.
    **dict.fromkeys(
        (
            *("tokenizer_legacy", "data_seed", "mlp_kernel", "fused_attn_kernel", "ddp"),
            *("ddp_broadcast_buffers", "dataloader_pin_memory", "torch_dtype"),
        ),
        (),
    ),
    "strict": (True, False),
    "wandb_log_model": (False, "", "false"),
}
"""Key without effect -> the values that ask for what happens anyway, and get no word; of others
these are the values at which they are off. A list or map that is empty never gets one."""


def is_off(key: str, value: Any) -> bool:
    """Whether `value` asks for nothing."""
    return not value or (not isinstance(value, bool) and value in OFF.get(key, ()))


def needs_no_word(key: str, value: Any) -> bool:
    """Whether what a key without effect asks for is what happens anyway."""
    if key not in ANYWAY:
        return is_off(key, value)
    if value is None or value in ([], {}):
        return True
    return any(type(value) is type(known) and value == known for known in ANYWAY[key])
