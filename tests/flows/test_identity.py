"""Every recipe key, and which stages' results it decides: a new key must be placed here."""

import pytest

from regrow.configs.faults import RecipeError
from regrow.configs.load import load_recipe
from regrow.configs.recipe import Recipe
from regrow.infra.digests import DigestMemo
from regrow.tasks.plan import make_plan

ALL = {"prepare", "train", "merge", "baseline", "evaluate", "publish"}
TRAIN = {"train", "merge", "evaluate", "publish"}
WEIGHTS = TRAIN | {"baseline"}
SCORES = {"baseline", "evaluate", "publish"}
PUBLISH = {"publish"}
NOTHING: set[str] = set()
REFUSED = None

WHOLE = ["--adapter=null"]
WHOLE_TRAIN = TRAIN - {"merge"}

# {key: (words of a change from the recipe of `place`, titles of the stages whose keys change)}
FIELDS: dict[str, tuple[list[str], set[str] | None]] = {
    "base_model_config": (["other/model"], REFUSED),
    "revision_of_model": (["main"], NOTHING),  # means nothing for a local directory
    "tokenizer_use_mistral_common": (["true"], ALL),
    "model_type": (["LlamaForCausalLM"], NOTHING),
    "tokenizer_type": (["PreTrainedTokenizerFast"], NOTHING),
    "trust_remote_code": (["true"], NOTHING),
    "special_tokens": (["{pad_token: <|endoftext|>}"], ALL),
    "reinit_weights": (["true", *WHOLE], WHOLE_TRAIN),
    "tokens": (["[<new>]", "--lora_modules_to_save=[embed_tokens, lm_head]"], ALL),
    "attn_implementation": (["sdpa"], NOTHING),
    "test_datasets": (["[{path: rows.jsonl, type: chat_template}]", "--val_set_size=0"], ALL),
    "val_set_size": (["7"], ALL),
    "sequence_len": (["96"], ALL),
    "excess_length_strategy": (["truncate"], ALL),
    "min_sample_len": (["3"], ALL),
    "sample_packing": (["false"], ALL),
    "eval_sample_packing": (["false"], ALL),
    "sample_packing_sequentially": (["true"], ALL),
    "eval_sequence_len": (["64"], ALL),
    "validation_leakage": (["keep"], NOTHING),
    "streaming": (["true", "--max_steps=1"], ALL),
    "group_by_length": (["true", "--sample_packing=false"], ALL),
    "curriculum_sampling": (["true"], TRAIN),
    "pad_to_sequence_len": (["true"], NOTHING),
    "shuffle_merged_datasets": (["false"], ALL),
    "shuffle_before_merging_datasets": (["true", "--shuffle_merged_datasets=false"], ALL),
    "dataset_shard_num": (["2"], ALL),
    "dataset_shard_idx": (["1", "--dataset_shard_num=2"], ALL),
    "on_bad_rows": (["drop"], ALL),
    "dataset_exact_deduplication": (["true"], ALL),
    "dataset_num_proc": (["3"], NOTHING),
    "chat_template": (["chatml"], ALL),
    "chat_template_jinja": (["{{ messages[0].content }}"], ALL),
    "eot_tokens": (["[<|im_end|>]"], ALL),
    "chat_template_kwargs": (["{enable_thinking: false}"], ALL),
    "default_system_message": (["Be brief."], ALL),
    "train_on_inputs": (["true"], ALL),
    "rl": (["dpo"], ALL),
    "reward_model": (["true"], ALL),
    "process_reward_model": (["true", "--datasets.0.type=stepwise_supervised"], ALL),
    "adapter": (["null"], WEIGHTS - {"baseline"}),
    "lora_r": (["8"], TRAIN),
    "lora_alpha": (["16"], TRAIN),
    "lora_dropout": (["0.2"], TRAIN),
    "lora_target_modules": (["[q_proj]", "--lora_target_linear=false"], TRAIN),
    "lora_target_linear": (["false", "--lora_target_modules=[v_proj]"], TRAIN),
    "lora_modules_to_save": (["[lm_head]"], TRAIN),
    "lora_model_dir": (["{adapter}"], TRAIN),
    "lora_target_parameters": (["[mlp.experts.down_proj]", "--lora_dropout=0"], TRAIN),
    "lora_exclude_modules": (["[q_proj]"], TRAIN),
    "lora_rank_pattern": (["{q_proj: 4}"], TRAIN),
    "lora_alpha_pattern": (["{q_proj: 4}"], TRAIN),
    "peft_layers_to_transform": (["[0]"], TRAIN),
    "peft_layers_pattern": (["[layers]", "--peft_layers_to_transform=[0]"], TRAIN),
    "peft_trainable_token_indices": (["[3]"], TRAIN),
    "loraplus_lr_ratio": (["16"], TRAIN),
    "loraplus_lr_embedding": (["1e-5", "--loraplus_lr_ratio=16"], TRAIN),
    "peft": (["{loftq_config: {loftq_bits: 4}}"], TRAIN),
    "peft_use_rslora": (["true"], TRAIN),
    "peft_use_dora": (["true"], TRAIN),
    "peft_init_lora_weights": (["gaussian"], TRAIN),
    # The product of the two is the global batch, which decides; their split does not.
    "micro_batch_size": (["2", "--gradient_accumulation_steps=1"], NOTHING),
    "gradient_accumulation_steps": (["4"], TRAIN),
    "batch_size": (["4", "--gradient_accumulation_steps=4"], TRAIN),
    "num_epochs": (["3", "--max_steps=null"], TRAIN),
    "max_steps": (["9"], TRAIN),
    "learning_rate": (["0.02"], TRAIN),
    "optimizer": (["sgd"], TRAIN),
    "optim_args": (["momentum=0.9", "--optimizer=sgd"], TRAIN),
    "optim_target_modules": (["[attn]", "--optimizer=galore_adamw", *WHOLE], WHOLE_TRAIN),
    "adam_beta3": (["0.99", "--optimizer=came_pytorch"], TRAIN),
    "adam_epsilon2": (["1e-12", "--optimizer=came_pytorch"], TRAIN),
    "embedding_lr": (["1e-5"], TRAIN),
    "embedding_lr_scale": (["0.5"], TRAIN),
    "lr_groups": (["[{name: q, modules: [q_proj], lr: 1e-4}]"], TRAIN),
    "unfrozen_parameters": (["[lm_head]", *WHOLE], WHOLE_TRAIN),
    "weight_decay": (["0.1"], TRAIN),
    "adam_beta1": (["0.8"], TRAIN),
    "adam_beta2": (["0.95"], TRAIN),
    "adam_epsilon": (["1e-6"], TRAIN),
    "max_grad_norm": (["2"], TRAIN),
    "lr_scheduler": (["linear"], TRAIN),
    "lr_scheduler_kwargs": (["{num_cycles: 2}"], TRAIN),
    "cosine_min_lr_ratio": (["0.1"], TRAIN),
    "cosine_constant_lr_ratio": (["0.5", "--cosine_min_lr_ratio=0.1"], TRAIN),
    "lr_div_factor": (["10", "--lr_scheduler=one_cycle"], TRAIN),
    "lr_quadratic_warmup": (["true"], TRAIN),
    "jagged_restart_steps": (["4"], TRAIN),
    "relora": (["true", "--jagged_restart_steps=4"], TRAIN),
    "relora_prune_method": (["random", "--relora=true", "--jagged_restart_steps=4"], TRAIN),
    "relora_prune_ratio": (["0.5", "--relora=true", "--jagged_restart_steps=4"], TRAIN),
    "jagged_restart_warmup_steps": (["1", "--jagged_restart_steps=4"], TRAIN),
    "jagged_restart_anneal_steps": (["1", "--jagged_restart_steps=4"], TRAIN),
    "warmup_steps": (["2"], TRAIN),
    "warmup_ratio": (["0.1", "--warmup_steps=null"], TRAIN),
    "neftune_noise_alpha": (["5"], TRAIN),
    "label_smoothing_factor": (["0.1"], TRAIN),
    "z_loss_coefficient": (["1e-4"], TRAIN),
    "output_router_logits": (["true"], TRAIN),
    "router_aux_loss_coef": (["0.1", "--output_router_logits=true"], TRAIN),
    "loss_watchdog_threshold": (["9"], NOTHING),
    "loss_watchdog_patience": (["2"], NOTHING),
    "early_stopping_patience": (["2"], TRAIN),
    "load_best_model_at_end": (["true"], TRAIN),
    "metric_for_best_model": (["eval_loss"], NOTHING),
    "greater_is_better": (["false"], NOTHING),
    "seed": (["7"], ALL),
    "bf16": (["true"], WEIGHTS),
    "fp8": (["true", *WHOLE], WHOLE_TRAIN),
    "tf32": (["false"], NOTHING),
    "gradient_checkpointing": (["true"], NOTHING),
    "gradient_checkpointing_kwargs": (["{use_reentrant: true}"], NOTHING),
    "logging_steps": (["3"], NOTHING),
    "save_strategy": (["epoch", "--save_steps=null"], NOTHING),
    "save_steps": (["3"], NOTHING),
    "saves_per_epoch": (["2", "--save_steps=null"], NOTHING),
    "save_total_limit": (["1"], NOTHING),
    "eval_strategy": (["epoch", "--eval_steps=null"], NOTHING),
    "eval_steps": (["3"], NOTHING),
    "evals_per_epoch": (["2", "--eval_steps=null"], NOTHING),
    "eval_batch_size": (["3"], NOTHING),
    "eval_prompts": (["[Hello]"], SCORES),
    "eval_table_size": (["4"], SCORES),
    "eval_max_new_tokens": (["5"], SCORES),
    "num_processes": (["2"], NOTHING),
    "launcher": (["ray"], NOTHING),
    "ray_num_workers": (["2", "--launcher=ray"], NOTHING),
    "resources_per_worker": (["{CPU: 2}", "--launcher=ray"], NOTHING),
    "store": (["memory://elsewhere"], NOTHING),
    "kernels": (["[mlp]"], NOTHING),
    "deepspeed": (["zero2.json"], NOTHING),
    "fsdp_version": (["2", "--fsdp_config={reshard_after_forward: true}"], NOTHING),
    "fsdp_config": (["{offload_params: true}"], NOTHING),
    "dp_replicate_size": (["2", "--fsdp_config={offload_params: true}"], NOTHING),
    "dp_shard_size": (["2", "--fsdp_config={offload_params: true}"], NOTHING),
    "context_parallel_size": (["2"], NOTHING),
    "tensor_parallel_size": (["2"], NOTHING),
    "gpu_memory_limit": (["17GiB"], NOTHING),
    "time_limit": (["90"], NOTHING),
    "hang_timeout": (["5"], NOTHING),
    "max_restarts": (["1"], NOTHING),
    "auto_find_batch_size": (["false"], NOTHING),
    "load_in_8bit": (["true"], TRAIN),
    "load_in_4bit": (["true"], TRAIN),
    "quantize_moe_experts": (["true", "--load_in_4bit=true"], TRAIN),
    "bnb_config_kwargs": (["{bnb_4bit_quant_type: fp4}", "--load_in_4bit=true"], TRAIN),
    "model_quantization_config": (
        ["Mxfp4Config", "--model_quantization_config_kwargs={dequantize: true}"],
        NOTHING,
    ),
    "model_quantization_config_kwargs": (["{dequantize: true}"], NOTHING),
    "mlflow_tracking_uri": (["http://127.0.0.1:1"], NOTHING),
    "mlflow_experiment_name": (["mine"], NOTHING),
    # A run's name is the model's name on its card and in its publication.
    "mlflow_run_name": (["mine"], PUBLISH),
    "run_name": (["mine"], PUBLISH),
    "output_dir": (["elsewhere"], PUBLISH),
    "hub_model_id": (["me/mine"], PUBLISH),
    "hub_private_repo": (["false", "--hub_model_id=me/mine"], PUBLISH),
    "hub_strategy": (["every_save"], NOTHING),
    "register_as": (["mine"], PUBLISH),
}
# Who hears of the course of training decides nothing: all at once, for speed.
REPORTING = {
    "use_wandb": "true",
    "wandb_project": "mine",
    "wandb_entity": "us",
    "wandb_name": "mine",
    "wandb_run_id": "r1",
    "wandb_mode": "offline",
    "wandb_watch": "all",
    "use_tensorboard": "true",
    "use_trackio": "true",
    "trackio_project_name": "mine",
    "trackio_run_name": "mine",
    "trackio_space_id": "us/mine",
    "use_comet": "true",
    "comet_project_name": "mine",
    "comet_workspace": "us",
    "comet_experiment_key": "k" * 32,
    "comet_mode": "create",
    "comet_online": "false",
    "use_swanlab": "true",
    "swanlab_project": "mine",
    "swanlab_experiment_name": "mine",
    "swanlab_workspace": "us",
    "swanlab_mode": "local",
    "swanlab_web_host": "http://127.0.0.1:1",
    "swanlab_api_host": "http://127.0.0.1:2",
}
# Their content decides, not their text: tests/flows/test_cache.py.
BY_CONTENT = {"base_model", "tokenizer_config", "datasets"}


def keys(place, overrides: list[str]) -> dict[str, str]:
    loaded = load_recipe(place.recipe, overrides)
    memo = DigestMemo(place.root / "digests.sqlite")
    return {s.title: s.key for s in make_plan(loaded.recipe, loaded.name, memo).stages}


def test_every_key_of_the_recipe_is_placed():
    assert set(Recipe.model_fields) == set(FIELDS) | set(REPORTING) | BY_CONTENT


@pytest.mark.parametrize("field", FIELDS)
def test_a_key_enters_the_stages_it_decides_and_no_other(place, field):
    words, expected = FIELDS[field]
    overrides = [f"--{field}={words[0]}", *words[1:]]
    if expected is REFUSED:
        with pytest.raises(RecipeError, match=field):
            keys(place, overrides)
        return
    if field == "lora_model_dir":
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (place.root / "adapter").mkdir(exist_ok=True)
            (place.root / "adapter" / name).write_text(name)
        overrides = [f"--{field}={place.root / 'adapter'}"]
    before = keys(place, WHOLE if "--adapter=null" in words[1:] else [])
    after = keys(place, overrides)
    if field == "adapter":  # without one there is nothing to merge
        assert "merge" not in after
        before.pop("merge")
        expected = expected - {"merge"}
    assert {title for title in before if before[title] != after[title]} == expected


def test_reporting_enters_no_key(place):
    overrides = [f"--{key}={value}" for key, value in REPORTING.items()]
    recipe, plain = (load_recipe(place.recipe, words).recipe for words in (overrides, []))
    assert all(getattr(recipe, key) != getattr(plain, key) for key in REPORTING)
    assert keys(place, overrides) == keys(place, [])


def test_placement_in_all_its_ways_at_once_enters_no_key(place):
    words = [
        word
        for field in ("micro_batch_size", "num_processes", "fsdp_config", "tf32", "kernels")
        for word in (f"--{field}={FIELDS[field][0][0]}", *FIELDS[field][0][1:])
    ]
    assert keys(place, words) == keys(place, [])


def test_new_weights_of_the_same_name_rerun_all_but_prepare(place, tiny_llama_dir):
    import shutil

    own = place.root / "model"
    shutil.copytree(tiny_llama_dir, own)
    place.write_recipe(base_model=str(own))
    before = keys(place, [])
    data = bytearray((own / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (own / "model.safetensors").write_bytes(data)
    after = keys(place, [])
    assert {title for title in before if before[title] != after[title]} == WEIGHTS


def test_a_new_tokenizer_reruns_everything(place, tiny_llama_dir):
    import json
    import shutil

    own = place.root / "tokenizer"
    shutil.copytree(tiny_llama_dir, own)
    before = keys(place, [f"--tokenizer_config={own}"])
    config = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 17}))
    after = keys(place, [f"--tokenizer_config={own}"])
    assert {title for title in before if before[title] != after[title]} == ALL
