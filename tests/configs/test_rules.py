"""Each rule between keys: from YAML text to the message its author reads."""

from __future__ import annotations

import pytest

from regrow.configs.rules import (
    adapter,
    batch,
    data,
    model,
    parallel,
    patterns,
    relora,
    reporting,
    schedule,
)
from regrow.configs.rules.all_rules import ALL_RULES
from regrow.configs.rules.rule import Rule
from regrow.configs.sections.data import CHAT_TEMPLATES, MODEL_TEMPLATES
from regrow.tasks.prepare.templates import OF_MODELS, TEMPLATES

LORA = "adapter: lora\nlora_r: 8\nlora_alpha: 16\n"
LINEAR = LORA + "lora_target_linear: true\n"

# rule -> cases of (lines added to the smallest recipe, key at fault, part of the reason)
CASES: dict[str, list[tuple[str, str, str]]] = {
    "there_is_training_data": [("datasets: []", "datasets", "the list is empty")],
    "validation_data_is_said_once": [
        (
            "val_set_size: 0.1\ntest_datasets: [{path: org/t, type: alpaca}]",
            "val_set_size",
            "`test_datasets` says already",
        )
    ],
    "val_set_size_is_a_share_or_a_number": [
        ("val_set_size: 1.0", "val_set_size", "must be below 1"),
        ("val_set_size: 2.5", "val_set_size", "must be below 1"),
    ],
    "shards_and_index_fit": [
        (
            "test_datasets: [{path: org/t, type: alpaca, shards: 4, shards_idx: 4}]",
            "test_datasets[0].shards_idx",
            "with shards: 4 the last one is 3",
        ),
        (
            "test_datasets: [{path: org/t, type: alpaca, shards_idx: 4}]",
            "test_datasets[0].shards_idx",
            "`shards` is not given",
        ),
    ],
    "files_named_have_no_splits": [
        (
            "test_datasets: [{path: 'https://x/t.jsonl', type: alpaca, split: test}]",
            "test_datasets[0].split",
            "no split to choose among them",
        ),
        (
            "test_datasets: [{path: org/t, type: alpaca, data_files: a.json, split: 'val[:9]'}]",
            "test_datasets[0].split",
            "no split to choose among them",
        ),
    ],
    "dataset_shard_and_index_fit": [
        ("dataset_shard_idx: 1", "dataset_shard_idx", "`dataset_shard_num` is not given"),
        ("dataset_shard_num: 2\ndataset_shard_idx: 2", "dataset_shard_idx", "the last one is 1"),
    ],
    "validation_examples_count_once": [
        (
            "test_datasets: [{path: org/t, type: alpaca, weight: 2}]",
            "test_datasets[0].weight",
            "used once",
        )
    ],
    "a_stream_has_an_end": [("streaming: true", "max_steps", "that is not given")],
    "a_stream_is_read_from_its_beginning": [
        (
            f"streaming: true\nmax_steps: 9\ndatasets: [{{path: x, type: completion, {what}}}]",
            f"datasets[0].{key}",
            "is not known",
        )
        for what, key in (
            ("shards: 2", "shards"),
            ("split: 'train[:10%]'", "split"),
            ("split: 'train[-5:]'", "split"),
            ("split: 'train[:-5]'", "split"),
        )
    ],
    "a_stream_is_not_divided": [
        (
            "streaming: true\nmax_steps: 9\ndataset_shard_num: 2",
            "dataset_shard_num",
            "no more than this run needs",
        )
    ],
    "padding_is_long_enough": [
        (
            "val_set_size: 9\neval_sequence_len: 1025\npad_to_sequence_len: true",
            "eval_sequence_len",
            "pads validation rows",
        )
    ],
    "formats_are_known": [
        (
            "test_datasets: [{path: org/t, type: alpca}]",
            "test_datasets[0].type",
            "there is no such format",
        ),
        (
            "test_datasets: [{path: org/t, type: jsonl}]",
            "test_datasets[0].type",
            "that is a kind of file",
        ),
        (
            "test_datasets: [{path: org/t, type: 'alpaca:vicuna'}]",
            "test_datasets[0].type",
            "there is no such format",
        ),
        (
            "test_datasets: [{path: org/t, type: _synthetic}]",
            "test_datasets[0].type",
            "it makes tokens up",
        ),
        (
            "test_datasets: [{path: org/t, type: my_package.rows.read}]",
            "test_datasets[0].type",
            "as that of a Python function it is not trusted",
        ),
    ],
    "formats_fit_the_method": [
        ("rl: dpo", "datasets[0].type", "`rl: dpo` reads no such format"),
        (
            "rl: kto\ndatasets: [{path: org/t, type: chatml.icr}]",
            "datasets[0].type",
            "`rl: kto` reads no such format",
        ),
        (
            "process_reward_model: true\ndatasets: [{path: org/t, type: {field_prompt: q}}]",
            "datasets[0].type",
            "has no map of columns",
        ),
    ],
    "one_method": [
        (
            "rl: dpo\nreward_model: true\ndatasets: [{path: org/t, type: chatml.intel}]",
            "reward_model",
            "`rl` says another method",
        )
    ],
    "answers_are_read_beside_a_method": [
        (
            "datasets: [{path: org/t, type: {field_chosen: good}}]",
            "datasets[0].type",
            "no method is named",
        ),
        (
            "rl: dpo\ndatasets: [{path: org/t, type: {chosen_format: '{answer}'}}]",
            "datasets[0].type.chosen_format",
            "it cannot hold {answer}, only {chosen}",
        ),
    ],
    "prompts_name_their_parts": [
        (
            "test_datasets: [{path: org/t, type: {no_input_format: '{instruction} {input}'}}]",
            "test_datasets[0].type.no_input_format",
            "it cannot hold {input}, only {instruction}",
        ),
        (
            "test_datasets: [{path: org/t, type: {format: 'a } b'}}]",
            "test_datasets[0].type.format",
            "its braces do not fit",
        ),
    ],
    "styles_are_known": [
        (
            "test_datasets: [{path: org/t, type: alpaca_chat, conversation: vicuna}]",
            "test_datasets[0].conversation",
            "there is no such style",
        ),
        (
            "test_datasets: [{path: org/t, type: alpaca, conversation: chatml}]",
            "test_datasets[0].conversation",
            "the style of `type: alpaca_chat`",
        ),
    ],
    "dataset_code_is_never_run": [
        (
            "test_datasets: [{path: org/t, type: alpaca, trust_remote_code: true}]",
            "test_datasets[0].trust_remote_code",
            "never run",
        )
    ],
    "jinja_templates_have_text": [
        ("chat_template: jinja", "chat_template", "`chat_template_jinja` is not given"),
        (
            "chat_template: chatml\nchat_template_jinja: '{{ x }}'",
            "chat_template_jinja",
            "`chat_template: chatml` says otherwise",
        ),
    ],
    "chat_templates_are_known": [
        ("chat_template: llama99", "chat_template", "there is no such template"),
        (
            "chat_template: tokenizer_default_fallback_x",
            "chat_template",
            "there is no such template",
        ),
        (
            "test_datasets: [{path: org/t, type: chat_template, chat_template: x}]",
            "test_datasets[0].chat_template",
            "there is no such template",
        ),
    ],
    "some_length_is_left": [("min_sample_len: 1025", "min_sample_len", "no example can be")],
    "the_global_batch_is_said": [
        ("gradient_accumulation_steps: null", "micro_batch_size", "is not said"),
    ],
    "the_batch_keys_agree": [
        ("batch_size: 16", "batch_size", "micro_batch_size * gradient_accumulation_steps is 8"),
    ],
    "a_chosen_micro_batch_needs_the_global_batch": [
        (
            "micro_batch_size: auto\nbatch_size: 8",
            "gradient_accumulation_steps",
            "another on each machine",
        ),
    ],
    "the_batch_divides_evenly": [
        ("gradient_accumulation_steps: null\nbatch_size: 5", "batch_size", "no multiple of"),
        ("gradient_accumulation_steps: null\nbatch_size: 1", "batch_size", "no multiple of"),
        ("micro_batch_size: null\nbatch_size: 6", "batch_size", "gradient_accumulation_steps, 4"),
    ],
    "warmup_is_said_once": [
        ("warmup_steps: 10\nwarmup_ratio: 0.1", "warmup_steps", "`warmup_ratio: 0.1` says"),
    ],
    "saving_is_said_once": [
        ("save_steps: 10\nsaves_per_epoch: 1", "save_steps", "`saves_per_epoch` says otherwise"),
    ],
    "validating_is_said_once": [
        (
            "val_set_size: 0.1\neval_steps: 10\nevals_per_epoch: 1",
            "eval_steps",
            "`evals_per_epoch` says otherwise",
        ),
    ],
    "saving_fits_its_strategy": [
        ("save_strategy: epoch\nsave_steps: 10", "save_steps", "`save_strategy: epoch`"),
        ("save_strategy: no\nsaves_per_epoch: 2", "saves_per_epoch", "`save_strategy: no`"),
    ],
    "validating_fits_its_strategy": [
        (
            "val_set_size: 0.1\neval_strategy: epoch\neval_steps: 10",
            "eval_steps",
            "`eval_strategy: epoch`",
        ),
        (
            "val_set_size: 0.1\neval_strategy: no\nevals_per_epoch: 2",
            "evals_per_epoch",
            "`eval_strategy: no`",
        ),
    ],
    "saving_by_steps_has_steps": [
        ("save_strategy: steps", "save_strategy", "neither `save_steps` nor"),
    ],
    "validating_by_steps_has_steps": [
        ("val_set_size: 9\neval_strategy: steps", "eval_strategy", "neither `eval_steps` nor"),
    ],
    "validating_needs_data": [
        ("val_set_size: 0\neval_steps: 10", "eval_steps", "there is no validation data"),
        ("val_set_size: 0.0\neval_strategy: epoch", "eval_strategy", "there is no validation"),
    ],
    "steps_are_whole_or_a_share": [
        ("save_steps: 2.5", "save_steps", "a whole number, or a share"),
        ("val_set_size: 9\neval_steps: 7.5", "eval_steps", "a whole number, or a share"),
    ],
    "a_lowest_rate_needs_a_cosine": [
        ("lr_scheduler: linear\ncosine_min_lr_ratio: 0.1", "cosine_min_lr_ratio", "no meaning"),
    ],
    "schedulers_have_their_arguments": [
        ("lr_scheduler: cosine_with_min_lr", "lr_scheduler", "no lowest learning rate"),
        ("lr_scheduler: warmup_stable_decay", "lr_scheduler", "no decay"),
    ],
    "what_follows_validation_has_it": [
        ("lr_scheduler: reduce_lr_on_plateau", "lr_scheduler", "no validation"),
        ("early_stopping_patience: 2", "early_stopping_patience", "no validation"),
        ("load_best_model_at_end: true", "load_best_model_at_end", "no validation"),
        ("save_strategy: best", "save_strategy", "no validation"),
    ],
    "a_constant_end_has_a_rate": [
        (
            "lr_scheduler: linear\ncosine_constant_lr_ratio: 0.5",
            "cosine_constant_lr_ratio",
            "no meaning",
        ),
        ("cosine_constant_lr_ratio: 0.5", "cosine_constant_lr_ratio", "needs a lowest rate"),
    ],
    "a_lowest_rate_is_said_once": [
        (
            "cosine_min_lr_ratio: 0.1\nlr_scheduler_kwargs: {min_lr: 1e-5}",
            "cosine_min_lr_ratio",
            "`lr_scheduler_kwargs` says min_lr: 1e-05",
        ),
        (
            "cosine_min_lr_ratio: 0.1\nlr_scheduler_kwargs: {min_lr_rate: 0.2}",
            "cosine_min_lr_ratio",
            "`lr_scheduler_kwargs` says min_lr_rate: 0.2",
        ),
        (
            "lr_scheduler: cosine_with_min_lr\n"
            "lr_scheduler_kwargs: {min_lr: 1e-5, min_lr_rate: 0.2}",
            "lr_scheduler_kwargs.min_lr",
            "`lr_scheduler_kwargs` says min_lr: 1e-05",
        ),
    ],
    "curves_have_their_own_keys": [
        ("lr_scheduler: linear\nlr_quadratic_warmup: true", "lr_quadratic_warmup", "no meaning"),
        ("lr_div_factor: 10", "lr_div_factor", "no meaning"),
    ],
    "restarts_are_complete": [
        ("jagged_restart_warmup_steps: 2", "jagged_restart_warmup_steps", "is missing"),
        (
            "jagged_restart_steps: 3\njagged_restart_warmup_steps: 4",
            "jagged_restart_steps",
            "are longer",
        ),
        (
            "jagged_restart_steps: 3\nlr_scheduler: one_cycle",
            "jagged_restart_steps",
            "cannot restart",
        ),
    ],
    "relora_is_complete": [
        ("relora: true\njagged_restart_steps: 9", "relora", "there is none"),
        (LINEAR + "relora: true", "relora", "the number of steps of a round"),
        (
            LINEAR + "relora: true\njagged_restart_steps: 9\noptimizer: lion_8bit",
            "optimizer",
            "cannot prune the state of lion_8bit",
        ),
        (
            LORA + "relora: true\njagged_restart_steps: 9\nlora_model_dir: o/a",
            "lora_model_dir",
            "begins with a fresh adapter",
        ),
    ],
    "rounds_sum_up": [
        (
            LINEAR + "relora: true\njagged_restart_steps: 9\n" + lines,
            key,
            why,
        )
        for lines, key, why in (
            ("peft_use_dora: true", "peft_use_dora", "only for plain LoRA"),
            ("peft_init_lora_weights: pissa", "peft_init_lora_weights", "begins at 0"),
            ("deepspeed: deepspeed_configs/zero2.json", "deepspeed", "sharded models"),
            ("tensor_parallel_size: 2\nnum_processes: 2", "tensor_parallel_size", "divided layers"),
            ("load_best_model_at_end: true", "load_best_model_at_end", "whose adapter is gone"),
            ("early_stopping_patience: 2", "early_stopping_patience", "whose adapter is gone"),
        )
    ],
    "learning_rates_are_said_once": [
        ("embedding_lr: 1e-5\nembedding_lr_scale: 0.5", "embedding_lr_scale", "says otherwise"),
        (
            LINEAR + "loraplus_lr_ratio: 16\nembedding_lr: 1e-5",
            "embedding_lr",
            "divides the parameters already",
        ),
        ("optimizer: muon\nembedding_lr: 1e-5", "embedding_lr", "in its own way"),
    ],
    "projections_are_for_whole_weights": [
        (
            LINEAR + "optimizer: galore_adamw",
            "optimizer",
            "projects whole weights",
        ),
    ],
    "lora_is_complete": [
        ("adapter: lora\nlora_alpha: 8\nlora_target_linear: true", "lora_r", "needs a rank"),
        ("adapter: lora\nlora_r: 8\nlora_target_linear: true", "lora_alpha", "needs a scale"),
        (LORA, "lora_target_linear", "needs layers to adapt"),
    ],
    "target_patterns_are_valid": [
        (LORA + "lora_target_modules: '(q'", "lora_target_modules", "not a regular expression"),
        (LINEAR + "lora_exclude_modules: '*'", "lora_exclude_modules", "not a regular expression"),
        *(
            (LINEAR + f"lora_exclude_modules: '{pattern}'", "lora_exclude_modules", "take forever")
            for pattern in (
                *("(a+)+", r"(\w+\w)+", r"(.+\.)+x", r"((\w+\.)+)+", r"(\w+\.?)*", "(a|b+c)+"),
                *(r"(?:[\w.]+\.)+", r"(\w+\.+)+", r"(.?a*\.)+", r"(\.?a+\.)+"),
            )
        ),
        (
            LINEAR + f"lora_exclude_modules: '{'a*' * 6000}'",
            "lora_exclude_modules",
            "more than 10,000 characters",
        ),
        (
            "optimizer: galore_adamw\noptim_target_modules: ['(']",
            "optim_target_modules",
            "not a regular expression",
        ),
    ],
    "one_pattern_stands_alone": [
        (LORA + "lora_target_modules: [q_proj, 'v.*']", "lora_target_modules", "is a pattern"),
        (LINEAR + "lora_exclude_modules: [q_proj, 'v.*']", "lora_exclude_modules", "is a pattern"),
    ],
    "a_pattern_excludes_all_linear_layers": [
        (
            LORA + "lora_target_modules: '.*_proj'\nlora_target_linear: true",
            "lora_target_modules",
            "takes every linear layer already",
        ),
    ],
    "first_values_are_known": [
        (LINEAR + "peft_init_lora_weights: corda", "peft_init_lora_weights", "not here"),
    ],
    "first_values_fit_the_base": [
        (
            LINEAR + "load_in_4bit: true\npeft_init_lora_weights: pissa",
            "peft_init_lora_weights",
            "not quantized",
        ),
        (
            LINEAR + "peft_use_dora: true\npeft_init_lora_weights: olora",
            "peft_init_lora_weights",
            "DoRA's magnitudes",
        ),
        (
            LINEAR + "peft_use_rslora: true\nlora_rank_pattern: {q_proj: 2}\n"
            "peft_init_lora_weights: pissa",
            "peft_init_lora_weights",
            "with peft_use_rslora",
        ),
        (
            LINEAR + "lora_modules_to_save: [lm_head]\npeft_init_lora_weights: pissa",
            "peft_init_lora_weights",
            "trained in full",
        ),
        (
            LINEAR + "lora_model_dir: out\npeft_init_lora_weights: eva",
            "peft_init_lora_weights",
            "gives the first values",
        ),
    ],
    "qlora_is_four_bits": [
        (
            LINEAR.replace("lora\n", "qlora\n", 1) + "load_in_8bit: true",
            "load_in_8bit",
            "means 4 bits",
        ),
        (
            LINEAR.replace("lora\n", "qlora\n", 1) + "load_in_4bit: false",
            "load_in_4bit",
            "means 4 bits",
        ),
    ],
    "quantization_has_its_arguments": [
        (
            LINEAR + "load_in_4bit: true\nbnb_config_kwargs: {bits: 4}",
            "bnb_config_kwargs.bits",
            "no such argument",
        ),
        *(
            (
                LINEAR + f"load_in_4bit: true\nbnb_config_kwargs: {{bnb_4bit_{name}: {value}}}",
                f"bnb_config_kwargs.bnb_4bit_{name}",
                "expected one of",
            )
            for name, value in (
                ("quant_type", "int4"),
                ("compute_dtype", "half"),
                ("quant_storage", 8),
                ("use_double_quant", "no!"),
            )
        ),
    ],
    "stored_quantized_means_dequantized": [
        ("model_quantization_config: Mxfp4Config", "model_quantization_config", "dequantized"),
        (
            LINEAR + "load_in_4bit: true\nmodel_quantization_config: Mxfp4Config\n"
            "model_quantization_config_kwargs: {dequantize: true}",
            "model_quantization_config",
            "in two ways",
        ),
    ],
    "names_are_in_a_list": [
        (
            LORA + "lora_target_modules: q_proj, v_proj",
            "lora_target_modules",
            "is one name to YAML",
        ),
        (
            LINEAR + "lora_modules_to_save: [embed_tokens lm_head]",
            "lora_modules_to_save",
            "is one name to YAML",
        ),
    ],
    "dequantized_weights_are_loaded_by_all": [
        (
            LINEAR + "model_quantization_config: Mxfp4Config\n"
            "model_quantization_config_kwargs: {dequantize: true}\n"
            "fsdp_config: {cpu_ram_efficient_loading: true}",
            "fsdp_config.cpu_ram_efficient_loading",
            "while each process reads them",
        )
    ],
    "parameters_have_plain_adapters": [
        (
            LORA + "lora_target_parameters: [experts.down_proj]\nlora_dropout: 0.1",
            "lora_dropout",
            "without dropout",
        ),
        (
            LORA + "lora_target_parameters: [experts.down_proj]\npeft_use_dora: true",
            "peft_use_dora",
            "without DoRA",
        ),
    ],
    "layers_are_counted_in_a_list": [
        (LINEAR + "peft_layers_pattern: layers", "peft_layers_pattern", "is missing"),
        (
            LINEAR + "peft_layers_to_transform: [0]\npeft_layers_pattern: '('",
            "peft_layers_pattern",
            "not a regular expression",
        ),
    ],
    "divided_layers_are_whole_copies": [
        (
            "tensor_parallel_size: 2\ncontext_parallel_size: 2",
            "tensor_parallel_size",
            "share rows too",
        ),
        (
            LINEAR + "tensor_parallel_size: 2\nload_in_8bit: true",
            "tensor_parallel_size",
            "in 8 bits cannot be divided",
        ),
        (
            LINEAR.replace("lora", "qlora", 1)
            + "tensor_parallel_size: 2\nload_in_4bit: true\nquantize_moe_experts: true",
            "tensor_parallel_size",
            "quantized experts",
        ),
        ("tensor_parallel_size: 2\nnum_processes: 4", "tensor_parallel_size", "a machine has 4"),
    ],
    "divided_layers_are_sharded_in_groups": [
        (f"tensor_parallel_size: 2\nnum_processes: 4\n{more}", key, why)
        for more, key, why in (
            (
                "dp_shard_size: 3\nfsdp_config: {}",
                "tensor_parallel_size",
                "dp_shard_size is 6, and a machine has 4 processes",
            ),
            (
                LINEAR.replace("lora", "qlora", 1) + "load_in_4bit: true\nfsdp_config: {}",
                "tensor_parallel_size",
                "layers of a quantized base",
            ),
            (
                "fsdp_config: {offload_params: true}",
                "fsdp_config.offload_params",
                "without this",
            ),
        )
    ],
    "divided_layers_are_trained_plainly": [
        (f"{more}\nnum_processes: 2\ntensor_parallel_size: 2", key, why)
        for more, key, why in (
            *(
                (f"optimizer: {name}", "optimizer", "the tensors that tensor_parallel_size divides")
                for name in ("paged_adamw_8bit", "adamw_torch_8bit", "muon", "adafactor")
            ),
            *(
                (f"{line}", line.partition(":")[0], "needs whole ones")
                for line in (
                    *("unfrozen_parameters: [lm_head]", "reinit_weights: true"),
                    *("embedding_lr: 1e-5", "embedding_lr_scale: 0.5"),
                    "output_router_logits: true",
                    "lr_groups: [{name: a, modules: [lm_head], lr: 1e-5}]",
                )
            ),
            *(
                (f"{LINEAR}{line}", line.partition(":")[0], "needs whole ones")
                for line in (
                    *("loraplus_lr_ratio: 16", "lora_model_dir: out", "peft_use_dora: true"),
                    *("lora_modules_to_save: [lm_head]", "lora_target_parameters: [w]"),
                    *("peft_trainable_token_indices: [1]", "peft_init_lora_weights: eva"),
                )
            ),
            (
                LINEAR + "peft: {loftq_config: {loftq_bits: 4}}",
                "peft.loftq_config",
                "needs whole ones",
            ),
        )
    ],
    "an_adapter_has_its_own_choice": [
        (LINEAR + "unfrozen_parameters: [lm_head]", "unfrozen_parameters", "base is frozen"),
    ],
    "experts_are_balanced_over_whole_rows": [
        (
            "output_router_logits: true\ncontext_parallel_size: 2",
            "output_router_logits",
            "how evenly it uses the experts",
        ),
    ],
    "experts_are_quantized_with_the_rest": [
        (LINEAR + "quantize_moe_experts: true", "quantize_moe_experts", "base is not quantized"),
        (
            LINEAR + "load_in_4bit: true\nquantize_moe_experts: true\n"
            "deepspeed: deepspeed_configs/zero2.json",
            "quantize_moe_experts",
            "cannot lay out",
        ),
    ],
    "random_weights_are_trained_themselves": [
        (LINEAR + "reinit_weights: true", "reinit_weights", "would fit no model"),
    ],
    "mistral_common_writes_all_itself": [
        ("tokenizer_use_mistral_common: true\n" + added, key, why)
        for added, key, why in (
            ("chat_template: chatml", "chat_template", "decides it"),
            ("tokens: [<x>]", "tokens", "decides it"),
            (
                "datasets: [{path: org/t, type: chat_template, chat_template: chatml}]",
                "datasets[0].chat_template",
                "decides it",
            ),
            ("special_tokens: {pad_token: <x>}", "special_tokens", "decides it"),
            ("train_on_inputs: true", "train_on_inputs", "answers alone"),
            (
                "test_datasets: [{path: org/t, type: alpaca}]",
                "test_datasets[0].type",
                "for conversations",
            ),
        )
    ],
    "float8_bases_have_16_bits": [
        (
            LINEAR.replace("lora\n", "qlora\n", 1) + "load_in_4bit: true\nfp8: true",
            "fp8",
            "in 4 or 8",
        )
    ],
    "float8_bases_give_16_bits": [
        (LINEAR + "fp8: true\nbf16: false", "fp8", "give bfloat16"),
    ],
    "float8_bases_are_whole": [
        (LINEAR + f"fp8: true\n{line}", "fp8", "each process holds all")
        for line in (
            "fsdp_config: {}",
            "deepspeed: {zero_optimization: {stage: 3}}",
            "tensor_parallel_size: 2",
        )
    ],
    "routers_have_gradients": [
        (
            "output_router_logits: true\ngradient_checkpointing: true\n"
            "gradient_checkpointing_kwargs:\n  use_reentrant: true",
            "gradient_checkpointing_kwargs.use_reentrant",
            "would not be balanced",
        ),
    ],
    "rank_patterns_are_valid": [
        (LINEAR + "lora_rank_pattern: {'(': 4}", "lora_rank_pattern.(", "not a regular expression"),
        (LINEAR + "lora_alpha_pattern: {'*v': 4}", "lora_alpha_pattern.*v", "not a regular"),
    ],
    "unfrozen_patterns_are_valid": [
        ("unfrozen_parameters: ['(']", "unfrozen_parameters", "not a regular expression"),
    ],
    "frozen_beginnings_keep_gradients": [
        (
            "unfrozen_parameters: [lm_head]\ngradient_checkpointing: true\n"
            "gradient_checkpointing_kwargs: {use_reentrant: true}",
            "gradient_checkpointing_kwargs.use_reentrant",
            "lose gradients",
        ),
    ],
    "quantized_weights_are_not_trained": [
        ("load_in_4bit: true", "load_in_4bit", "cannot be trained without an adapter"),
        (
            LINEAR + "load_in_4bit: true\nload_in_8bit: true",
            "load_in_8bit",
            "`load_in_4bit` says otherwise",
        ),
    ],
    "one_way_of_sharding": [
        ("deepspeed: zero2.json\nfsdp_config: {}", "deepspeed", "FSDP is asked for as well"),
    ],
    "deepspeed_says_only_where": [
        (
            "deepspeed: {zero_optimization: {stage: 1}, optimizer: {type: SGD}}",
            "deepspeed.optimizer",
            "which the recipe's own keys decide",
        ),
        (
            "deepspeed: {zero_optimization: {stage: 1}, gradient_clipping: 0.1}",
            "deepspeed.gradient_clipping",
            "which the recipe's own keys decide",
        ),
        (
            "deepspeed: {zero_optimization: {stage: 1}, fp16: {enabled: true}}",
            "deepspeed.fp16",
            "a scaled loss",
        ),
    ],
    "deepspeed_is_a_configuration": [
        (
            "deepspeed: {zero_optimization: 3}",
            "deepspeed.zero_optimization",
            "expected a map of keys",
        ),
    ],
    "sizes_need_fsdp": [
        ("dp_shard_size: 2", "dp_shard_size", "which is off"),
        ("dp_replicate_size: 2", "dp_replicate_size", "which is off"),
    ],
    "sizes_multiply_to_the_processes": [
        (
            "fsdp_config: {}\nnum_processes: 4\ndp_shard_size: 3",
            "dp_shard_size",
            "does not divide the 4 processes",
        ),
        (
            "fsdp_config: {}\nnum_processes: 2\ndp_replicate_size: 4",
            "dp_replicate_size",
            "2 processes cannot be 4 copies",
        ),
        (
            "fsdp_config: {}\nnum_processes: 8\nlauncher: ray\nray_num_workers: 3\n"
            "dp_replicate_size: 2\ndp_shard_size: 8",
            "dp_shard_size",
            "does not divide the 24 processes",
        ),
        (
            "context_parallel_size: 4\nnum_processes: 6",
            "context_parallel_size",
            "6 processes are no groups of 4",
        ),
        (
            "fsdp_config: {}\ndp_shard_size: 4\ncontext_parallel_size: 4\nnum_processes: 8\n"
            "launcher: ray\nray_num_workers: 1",
            "dp_shard_size",
            "dp_shard_size * context_parallel_size is 16, which does not divide the 8 processes",
        ),
        (
            "fsdp_config: {}\ndp_shard_size: 4\ncontext_parallel_size: 4\nnum_processes: 24",
            "dp_shard_size",
            "does not divide the 24 processes",
        ),
    ],
    "lists_of_layers_are_not_gathered": [
        (
            f"{more}fsdp_config: {{auto_wrap_policy: SIZE_BASED_WRAP, min_num_params: 9}}",
            "fsdp_config.auto_wrap_policy",
            "gather the list of all layers",
        )
        for more in ("", "tensor_parallel_size: 2\nnum_processes: 4\n")
    ],
    "muon_sees_whole_matrices": [
        ("optimizer: muon\ndeepspeed: zero2.json", "optimizer", "flattens the matrices"),
    ],
    "reporters_share_one_name": [
        (
            "use_wandb: true\nuse_trackio: true\nwandb_name: a\ntrackio_run_name: b",
            "trackio_run_name",
            "`wandb_name` says a",
        ),
    ],
    "swanlab_has_a_project": [
        ("use_swanlab: true", "use_swanlab", "`swanlab_project` is not given"),
    ],
    "comet_keys_have_their_length": [
        ("use_comet: true\ncomet_experiment_key: x", "comet_experiment_key", "32 to 50"),
    ],
    "only_causal_language_models": [
        ("model_type: AutoModelForSequenceClassification", "model_type", "only causal"),
        ("model_type: llama", "model_type", "not a class of Transformers for language models"),
    ],
    "tokenizer_classes_are_tokenizers": [
        ("tokenizer_type: Llama", "tokenizer_type", "not a tokenizer's class"),
    ],
    "the_model_has_its_own_config": [
        ("base_model_config: org/other", "base_model_config", "is not here yet"),
    ],
}


def changed(minimal: str, added: str) -> str:
    """The smallest recipe with lines added, or put in the place of its own."""
    lines = [line for line in added.splitlines() if line]
    keys = {line.partition(":")[0] for line in lines}
    kept = minimal
    for key in keys & {"datasets", "micro_batch_size", "gradient_accumulation_steps"}:
        block = next(line for line in kept.splitlines() if line.startswith(f"{key}:")) + "\n"
        kept = kept.replace(block, "")
    if "datasets" in keys:
        kept = kept.replace("  - path: org/data\n    type: alpaca\n", "")
    return kept + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("rule", "added", "key", "why"),
    [(rule, *case) for rule, cases in CASES.items() for case in cases],
)
def test_a_broken_rule_is_reported(faults_of, minimal, rule, added, key, why):
    text = changed(minimal, added)
    found = [fault for fault in faults_of(text) if fault.key == key and why in fault.why]
    assert len(found) == 1
    assert found[0].remedy
    if f"{key}:" in text:
        assert text.splitlines()[found[0].line - 1].startswith(key)


def test_the_smallest_recipe_breaks_no_rule(load, minimal):
    """So each fault above comes from the lines added."""
    assert load(minimal).recipe


def test_each_rule_has_its_case_and_its_place():
    assert {rule.name for rule in ALL_RULES} == CASES.keys()
    modules = (adapter, batch, data, model, parallel, patterns, relora, reporting, schedule)
    written = {v.name for m in modules for v in vars(m).values() if isinstance(v, Rule)}
    assert written == CASES.keys()
    assert len(ALL_RULES) == len(CASES)


def test_each_rule_says_what_it_is():
    assert all(rule.check.__doc__ for rule in ALL_RULES)


@pytest.mark.parametrize(
    "added",
    [
        "val_set_size: 0.1\nevals_per_epoch: 4\nsaves_per_epoch: 1",
        "val_set_size: 500\neval_steps: 0.25\nsave_steps: 100",
        "val_set_size: 0.0\nevals_per_epoch: 4",
        "eval_strategy: no\nsave_strategy: no",
        "warmup_steps: 0\nwarmup_ratio: 0.1",
        "batch_size: 8",
        "gradient_accumulation_steps: null\nbatch_size: 16",
        "gradient_accumulation_steps: null\nbatch_size: 15\nmicro_batch_size: auto",
        "chat_template: tokenizer_default_fallback_chatml",
        "chat_template_jinja: '{{ messages }}'",
        LORA + "lora_target_modules: '.*\\.(q|v)_proj'",
        LORA + r"lora_target_modules: '(\w+\.)+(q_proj|v_proj)'",
        LORA + r"lora_target_modules: '(?:[a-z_]+\.|x)?((?:layers\.\d+\.)+|(\d+x)*)q_proj'",
        *(
            f"optimizer: {name}\nnum_processes: 2\ntensor_parallel_size: 2"
            for name in ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
        ),
        LINEAR + "peft_init_lora_weights: gaussian\ntensor_parallel_size: 2",
        LINEAR + "peft_init_lora_weights: false\ntensor_parallel_size: 2",
        "fsdp_config: {}\ntensor_parallel_size: 2\ndp_shard_size: 2\nnum_processes: 4",
        "fsdp_config: {}\ntensor_parallel_size: 2\ndp_shard_size: 4\nnum_processes: 4",
        LINEAR + "fsdp_config: {}\ntensor_parallel_size: 2\nnum_processes: 8",
        "context_parallel_size: 4\nnum_processes: 8",
        "fsdp_config: {}\ncontext_parallel_size: 2\ndp_shard_size: 2\nnum_processes: 4",
        LORA + "lora_target_modules: [q_proj, v_proj]\nlora_target_linear: true",
        "fsdp: []\nfsdp_config:\ndeepspeed:",
        "fsdp_config: {}\nnum_processes: 8\ndp_replicate_size: 2\ndp_shard_size: 8",
        "fsdp_config: {}\nnum_processes: 2\ndp_replicate_size: 4\ndp_shard_size: 2",
        "fsdp_config: {}\nnum_processes: 4\ndp_replicate_size: 2",
        "fsdp_config: {}\nnum_processes: 8\nlauncher: ray\nray_num_workers: 3\n"
        "dp_replicate_size: 3\ndp_shard_size: 8",
        "rl: dpo\ndatasets: [{path: org/t}]",
        "rl: orpo\ndatasets: [{path: org/t, type: chat_template.argilla}]",
        "reward_model: true\ndatasets: [{path: org/t, type: bradley_terry.chat_template}]",
        "process_reward_model: true\ndatasets: [{path: org/t, type: stepwise_supervised}]",
        "model_type: MistralForCausalLM\ntokenizer_type: LlamaTokenizerFast",
        "base_model_config: org/model",
    ],
)
def test_what_runs_breaks_no_rule(load, minimal, added):
    load(changed(minimal, added))


def test_the_named_chat_templates_are_those_that_exist():
    assert set(CHAT_TEMPLATES) == set(TEMPLATES)
    assert set(MODEL_TEMPLATES) == set(OF_MODELS)


def test_a_missing_template_is_told_once(faults_of, minimal):
    text = minimal.replace("type: alpaca", "type: chat_template") + "chat_template: jinja\n"
    assert [fault.key for fault in faults_of(text)] == ["chat_template"]


def test_a_method_names_its_usual_formats(faults_of, minimal):
    (fault,) = faults_of(f"{minimal}rl: dpo\n")
    assert fault.remedy.startswith("Use one of ")
    assert fault.remedy.count(",") == 3


def test_loftq_is_at_fault_where_it_was_written(faults_of, minimal):
    text = minimal + LINEAR + "load_in_4bit: true\npeft: {loftq_config: {loftq_bits: 4}}\n"
    (fault,) = faults_of(text)
    assert (fault.key, fault.line) == ("peft.loftq_config", 14)


def test_a_remedy_holds_whole_names(faults_of, minimal):
    names = ", ".join(f"model.layers.{i}.q_proj" for i in range(9))
    (fault,) = faults_of(f"{minimal}{LORA}lora_target_modules: {names}\n")
    assert fault.remedy == "Write a list, one name an entry"
