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

# {key: (words of a change from the recipe of `place`, titles of the stages whose keys change)}
FIELDS: dict[str, tuple[list[str], set[str] | None]] = {
    "base_model_config": (["other/model"], REFUSED),
    "revision_of_model": (["main"], NOTHING),  # means nothing for a local directory
    "model_type": (["LlamaForCausalLM"], NOTHING),
    "tokenizer_type": (["PreTrainedTokenizerFast"], NOTHING),
    "trust_remote_code": (["true"], NOTHING),
    "special_tokens": (["{pad_token: <|endoftext|>}"], ALL),
    "tokens": (["[<new>]"], ALL),
    "attn_implementation": (["sdpa"], NOTHING),
    "test_datasets": (["[{path: rows.jsonl, type: chat_template}]", "--val_set_size=0"], ALL),
    "val_set_size": (["7"], ALL),
    "sequence_len": (["96"], ALL),
    "excess_length_strategy": (["truncate"], ALL),
    "min_sample_len": (["3"], ALL),
    "sample_packing": (["false"], ALL),
    "eval_sample_packing": (["false"], ALL),
    "pad_to_sequence_len": (["true"], NOTHING),
    "shuffle_merged_datasets": (["false"], ALL),
    "dataset_exact_deduplication": (["true"], ALL),
    "dataset_num_proc": (["3"], NOTHING),
    "chat_template": (["chatml"], ALL),
    "chat_template_jinja": (["{{ messages[0].content }}"], ALL),
    "eot_tokens": (["[<|im_end|>]"], ALL),
    "train_on_inputs": (["true"], ALL),
    "adapter": (["null"], WEIGHTS - {"baseline"}),
    "lora_r": (["8"], TRAIN),
    "lora_alpha": (["16"], TRAIN),
    "lora_dropout": (["0.2"], TRAIN),
    "lora_target_modules": (["[q_proj]", "--lora_target_linear=false"], TRAIN),
    "lora_target_linear": (["false", "--lora_target_modules=[v_proj]"], TRAIN),
    "lora_modules_to_save": (["[lm_head]"], TRAIN),
    "lora_model_dir": (["./adapter"], REFUSED),
    "peft_use_rslora": (["true"], TRAIN),
    "peft_use_dora": (["true"], TRAIN),
    "peft_init_lora_weights": (["gaussian"], TRAIN),
    # The product of the two is the global batch, which decides; their split does not.
    "micro_batch_size": (["2", "--gradient_accumulation_steps=1"], NOTHING),
    "gradient_accumulation_steps": (["4"], TRAIN),
    "batch_size": (["4", "--gradient_accumulation_steps=4"], TRAIN),
    "num_epochs": (["3"], TRAIN),
    "max_steps": (["9"], TRAIN),
    "learning_rate": (["0.02"], TRAIN),
    "optimizer": (["sgd"], TRAIN),
    "weight_decay": (["0.1"], TRAIN),
    "adam_beta1": (["0.8"], TRAIN),
    "adam_beta2": (["0.95"], TRAIN),
    "adam_epsilon": (["1e-6"], TRAIN),
    "max_grad_norm": (["2"], TRAIN),
    "lr_scheduler": (["linear"], TRAIN),
    "lr_scheduler_kwargs": (["{num_cycles: 2}"], TRAIN),
    "cosine_min_lr_ratio": (["0.1"], TRAIN),
    "warmup_steps": (["2"], TRAIN),
    "warmup_ratio": (["0.1", "--warmup_steps=null"], TRAIN),
    "neftune_noise_alpha": (["5"], TRAIN),
    "seed": (["7"], ALL),
    "bf16": (["true"], WEIGHTS),
    "fp16": (["true"], REFUSED),
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
    "store": (["memory://elsewhere"], NOTHING),
    "deepspeed": (["zero2.json"], REFUSED),
    "fsdp": (["[full_shard]"], REFUSED),
    "fsdp_version": (["2"], NOTHING),
    "fsdp_config": (["{offload_params: true}"], REFUSED),
    "load_in_8bit": (["true"], REFUSED),
    "load_in_4bit": (["true"], REFUSED),
    "mlflow_tracking_uri": (["http://127.0.0.1:1"], NOTHING),
    "mlflow_experiment_name": (["mine"], NOTHING),
    # A run's name is the model's name on its card and in its publication.
    "mlflow_run_name": (["mine"], PUBLISH),
    "run_name": (["mine"], PUBLISH),
    "output_dir": (["elsewhere"], PUBLISH),
    "hub_model_id": (["me/mine"], PUBLISH),
    "hub_private_repo": (["false"], PUBLISH),
    "hub_strategy": (["every_save"], NOTHING),
    "register_as": (["mine"], PUBLISH),
}
# Their content decides, not their text: tests/flows/test_cache.py.
BY_CONTENT = {"base_model", "tokenizer_config", "datasets"}


def keys(place, overrides: list[str]) -> dict[str, str]:
    loaded = load_recipe(place.recipe, overrides)
    memo = DigestMemo(place.root / "digests.sqlite")
    return {s.title: s.key for s in make_plan(loaded.recipe, loaded.name, memo).stages}


def test_every_key_of_the_recipe_is_placed():
    assert set(Recipe.model_fields) == set(FIELDS) | BY_CONTENT


@pytest.mark.parametrize("field", FIELDS)
def test_a_key_enters_the_stages_it_decides_and_no_other(place, field):
    words, expected = FIELDS[field]
    overrides = [f"--{field}={words[0]}", *words[1:]]
    if expected is REFUSED:
        with pytest.raises(RecipeError, match=field):
            keys(place, overrides)
        return
    before, after = keys(place, []), keys(place, overrides)
    if field == "adapter":  # without one there is nothing to merge
        assert "merge" not in after
        before.pop("merge")
        expected = expected - {"merge"}
    assert {title for title in before if before[title] != after[title]} == expected


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
