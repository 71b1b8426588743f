"""Golden tokens of preferences, unpaired answers, steps and prompts, with SmolLM2's tokenizer.

The expected texts are written by hand from the formats' published meaning (Axolotl's docs/rlhf.qmd,
TRL's "Dataset formats and types"); [[ ]] stands around what is learnt.
"""

import json

import pytest

from regrow.configs.load import parse_recipe
from regrow.configs.sections.answer_types import KIND_TYPES
from regrow.tasks.prepare.encoding import Encoder
from regrow.tasks.prepare.example import RowError
from regrow.tasks.prepare.formats.registry import FORMATS, chat_options, format_name
from regrow.tasks.prepare.masking import MaskRules
from regrow.tasks.prepare.tokenize import _from_one_context
from regrow.tasks.prepare.tokenizer import save_tokenizer

EOS = "<|im_end|>"
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.fixture(scope="module")
def saved(smollm2_dir, tmp_path_factory):
    return save_tokenizer(
        str(smollm2_dir),
        tmp_path_factory.mktemp("answers") / "tokenizer",
        special_tokens={},
        tokens=(),
        chat_template=None,
        fallback_template=None,
        trust_remote_code=False,
    )


@pytest.fixture(scope="module")
def encoder(saved):
    return Encoder(saved, saved.chat_template, MaskRules())


def recipe_of(method, dataset):
    keys = {
        "base_model": "m",
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "datasets": [{"path": "a.jsonl", **dataset}],
    }
    return parse_recipe({**keys, **method}).recipe


DPO, KTO, GRPO = {"rl": "dpo"}, {"rl": "kto"}, {"rl": "grpo"}
REWARD, STEPS = {"reward_model": True}, {"process_reward_model": True}


def read(method, dataset, row):
    recipe = recipe_of(method, dataset)
    entry = recipe.datasets[0]
    module = FORMATS[format_name(entry.type, "datasets.0", recipe.data_kind)]
    return module.read(row, module.Options.from_recipe(entry, recipe))


def marked(encoder, item):
    """Each sequence as text, learnt tokens in [[ ]]."""
    tokens = encoder.encode_many(item.sequences)
    if len(tokens) == 2:
        tokens = _from_one_context(tokens)
    return [_marked(encoder, its) for its in tokens]


def _marked(encoder, tokens):
    assert tokens.loss_mask[0] == 0
    pieces, on = [], 0
    runs = [[]]
    for token, learnt in zip(tokens.input_ids.tolist(), tokens.loss_mask.tolist(), strict=True):
        if learnt != on:
            runs.append([])
            on = learnt
        runs[-1].append(token)
    for number, run in enumerate(runs):
        text = encoder._backend.decode(run, skip_special_tokens=False)
        pieces.append(f"[[{text}]]" if number % 2 else text)
    return "".join(pieces)


def chatml(prompt, answer, system=None):
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return (
        f"{head}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n[[{answer}<|im_end|>]]"
    )


def talk(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


YES, NO = talk("q", "yes")[1:], talk("q", "no")[1:]


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("chatml", {"prompt": "q", "chosen": "yes", "rejected": "no"}),
        ("chatml.default", {"question": "q", "chosen_response": "yes", "rejected_response": "no"}),
        (
            "chatml.argilla",
            {"instruction": "q", "chosen_response": "yes", "rejected_response": "no"},
        ),
        ("chatml.icr", {"input": "q", "chosen": "yes", "rejected": "no"}),
        ("chatml.intel", {"question": "q", "chosen": "yes", "rejected": "no"}),
        ("chatml.prompt_pairs", {"prompt": "q", "chosen": "yes", "rejected": "no"}),
        ("chatml.ultra", {"prompt": "q", "chosen": talk("q", "yes"), "rejected": talk("q", "no")}),
    ],
)
@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_chatml_pairs(encoder, kind, row, system):
    item = read(DPO, {"type": kind}, {**row, "system": system})
    assert item.labels == (1, 0)
    assert marked(encoder, item) == [chatml("q", "yes", system), chatml("q", "no", system)]


def test_argilla_dialogues_keep_all_their_turns(encoder):
    rows = {"chosen": talk("q", "yes"), "rejected": talk("q", "no")}
    for kind in ("chatml.argilla_chat", "chat_template.argilla_chat", "chat_template.argilla"):
        one, other = marked(encoder, read(DPO, {"type": kind}, rows))
        assert one.endswith(chatml("q", "yes"))
        assert other.endswith(chatml("q", "no"))
    longer = {"chosen": talk("a", "b", "q", "yes"), "rejected": talk("a", "b", "q", "no")}
    one, _ = marked(encoder, read(DPO, {"type": "chatml.argilla_chat"}, longer))
    assert one == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n" + chatml(
        "q", "yes"
    )


def test_llama3_pairs_end_with_eot_and_eos(encoder):
    row = {"system": "s", "input": "q", "chosen": "yes", "rejected": "no"}
    texts = [
        "<|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nq<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        f"{answer}<|eot_id|>{EOS}"
        for answer in ("yes", "no")
    ]
    for kind, method in (
        ("llama3.icr", DPO),
        ("bradley_terry.llama3", REWARD),
        ("bradley_terry.llama3.icr", REWARD),
    ):
        found = marked(encoder, read(method, {"type": kind}, row))
        assert [text.replace("[[", "").replace("]]", "") for text in found] == texts


def test_nectar_takes_the_best_two(encoder):
    answers = [{"answer": text, "rank": rank} for text, rank in (("c", 3), ("a", 1), ("b", 2))]
    found = marked(
        encoder, read(DPO, {"type": "zephyr.nectar"}, {"prompt": "q", "answers": answers})
    )
    prompt = "<|system|>\n</s>\n<|user|>\nq</s>\n<|assistant|>\n"
    assert found == [f"{prompt}[[a{EOS}]]", f"{prompt}[[b{EOS}]]"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": talk("q"), "chosen": YES, "rejected": NO},
        {"prompt": talk("q"), "chosen": "yes", "rejected": "no"},
        {"chosen": talk("q", "yes"), "rejected": talk("q", "no")},
        {"prompt": "q", "chosen": talk("q", "yes"), "rejected": talk("q", "no")},
        {"prompt": "q", "chosen": YES, "rejected": NO},
        {"messages": talk("q"), "chosen": YES[0], "rejected": NO[0]},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        {"prompt": json.dumps(talk("q")), "chosen": json.dumps(YES), "rejected": json.dumps(NO)},
    ],
)
def test_messages_are_rendered_whatever_their_form(encoder, row):
    found = marked(encoder, read(DPO, {}, row))
    wanted = [chatml("q", answer).replace("]]", "\n]]") for answer in ("yes", "no")]
    assert [text[text.index("<|im_start|>user") :] for text in found] == wanted
    assert all(text.startswith(SYSTEM) for text in found)  # SmolLM2's template adds it


def test_chat_template_pairs_end_with_their_token(encoder):
    rows = [
        {"messages": talk("q"), "chosen": YES[0], "rejected": NO[0]},
        {"messages": "q", "chosen": "yes", "rejected": [*talk("x"), NO[0]]},
    ]
    for row in rows:
        found = marked(encoder, read(DPO, {"type": "chat_template.default"}, row))
        assert [t[t.index("<|im_start|>user") :] for t in found] == [
            chatml("q", "yes"),
            chatml("q", "no"),
        ]


def test_roles_and_properties_of_pairs_can_be_named(encoder):
    dataset = {
        "type": "chat_template.default",
        "field_messages": "talk",
        "field_chosen": "good",
        "field_rejected": "bad",
        "message_property_mappings": {"role": "who", "content": "says"},
        "roles": {"user": ["me"], "assistant": ["bot"]},
    }
    row = {
        "talk": [{"who": "me", "says": "q"}],
        "good": {"who": "bot", "says": "yes"},
        "bad": {"who": "bot", "says": "no"},
    }
    assert marked(encoder, read(DPO, dataset, row))[1].endswith(chatml("q", "no"))


def test_text_pairs_are_one_text_with_an_eos(encoder):
    row = {"prompt": "The sky is", "chosen": " blue. 😀", "rejected": f" green.{EOS}"}
    assert marked(encoder, read(DPO, {}, row)) == [
        f"The sky is[[ blue. 😀{EOS}]]",
        f"The sky is[[ green.{EOS}]]",
    ]


def test_both_answers_begin_in_one_context(encoder):
    """The space joins one answer only; it is learnt in both, as TRL does."""
    row = {"prompt": "The sky is ", "chosen": "blue", "rejected": "\n"}
    one, other = marked(encoder, read(DPO, {}, row))
    assert one == f"The sky is[[ blue{EOS}]]"
    assert other.startswith("The sky is[[ ")


def test_hh_prompt_ends_with_the_last_shared_turn(encoder):
    talked = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    row = {"chosen": f"{talked} No, sorry", "rejected": f"{talked} No, never"}
    assert marked(encoder, read(DPO, {}, row)) == [
        f"{talked}[[ No, sorry{EOS}]]",
        f"{talked}[[ No, never{EOS}]]",
    ]
    plain = {"chosen": "One two three", "rejected": "One two four"}
    assert marked(encoder, read(DPO, {}, plain)) == [
        f"One two[[ three{EOS}]]",
        f"One two[[ four{EOS}]]",
    ]


def test_dialogues_that_are_equal_still_have_an_answer(encoder):
    same = talk("q", "yes")
    item = read(DPO, {}, {"chosen": same, "rejected": same})
    assert marked(encoder, item)[0].endswith("[[yes<|im_end|>\n]]")


def test_map_writes_prompt_and_answers(encoder):
    dataset = {
        "type": {
            "field_prompt": "q",
            "field_system": "s",
            "field_chosen": "good",
            "prompt_format": "<{system}> {{x}} {prompt} ->",
            "chosen_format": " {chosen}.",
            "rejected_format": " {rejected}!",
        }
    }
    row = {"q": "why {}", "good": "a{b}", "rejected": "c"}
    assert marked(encoder, read(DPO, dataset, row)) == [
        f"<> {{x}} why {{}} ->[[ a{{b}}.{EOS}]]",
        f"<> {{x}} why {{}} ->[[ c!{EOS}]]",
    ]
    kto = {
        "type": {
            "field_completion": "a",
            "field_label": "good",
            "completion_format": " {completion}",
        }
    }
    item = read(KTO, kto, {"prompt": "p", "a": "x", "good": "no"})
    assert (marked(encoder, item), item.labels) == ([f"p[[ x{EOS}]]"], (0,))


def test_reward_pairs(encoder):
    row = {"system": "s", "input": "q", "chosen": "yes", "rejected": "no"}
    found = marked(encoder, read(REWARD, {"type": "bradley_terry.chat_template"}, row))
    assert found == [chatml("q", a, "s").replace("]]", "\n]]") for a in ("yes", "no")]


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("chatml.argilla", {"instruction": "q", "completion": "yes"}),
        ("chatml.intel", {"question": "q", "completion": "yes"}),
        ("chatml.prompt_pairs", {"prompt": "q", "completion": "yes"}),
        ("chatml.ultra", {"prompt": "q", "completion": "yes"}),
        ("chatml.argilla_chat", {"completion": talk("q", "yes")}),
    ],
)
def test_unpaired_chatml(encoder, kind, row):
    item = read(KTO, {"type": kind}, {**row, "label": True})
    assert item.labels == (1,)
    assert marked(encoder, item) == [chatml("q", "yes")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": talk("q", "yes")},
        {"prompt": talk("q"), "completion": YES},
        {"prompt": talk("q"), "completion": "yes"},
    ],
)
def test_unpaired_messages(encoder, row):
    (found,) = marked(encoder, read(KTO, {}, {**row, "label": 1}))
    assert found.endswith(chatml("q", "yes").replace("]]", "\n]]"))


@pytest.mark.parametrize(
    ("label", "meant"),
    [
        (True, 1),
        (False, 0),
        (1, 1),
        (0, 0),
        (1.0, 1),
        ("true", 1),
        ("False", 0),
        (" 1 ", 1),
        ("no", 0),
    ],
)
def test_labels_in_all_their_spellings(label, meant):
    assert read(KTO, {}, {"prompt": "p", "completion": "c", "label": label}).labels == (meant,)


@pytest.mark.parametrize("label", [None, "good", 2, -1, 0.5, [], float("nan")])
def test_other_labels_are_explained(label):
    with pytest.raises(RowError, match="column 'label' must say true or false"):
        read(KTO, {}, {"prompt": "p", "completion": "c", "label": label})


def test_steps(encoder):
    row = {"prompt": "Add 1.", "completions": ["one", "", "two "], "labels": [True, "0", 1]}
    item = read(STEPS, {"type": "stepwise_supervised"}, row)
    assert item.labels == (1, 0, 1)
    assert marked(encoder, item) == ["<|im_start|>Add 1.one[[\n\n]]two [[\n]]"]
    (tokens,) = encoder.encode_many(item.sequences)
    assert tokens.loss_mask.sum() == 3
    last = {
        "type": "stepwise_supervised",
        "train_on_last_step_only": True,
        "step_separator": " ###",
    }
    item = read(STEPS, last, row)
    assert item.labels == (1,)
    assert marked(encoder, item) == ["<|im_start|>Add 1.one ### ###two [[ ###]]"]
    limited = {"type": "stepwise_supervised", "max_completion_length": 2}
    assert marked(encoder, read(STEPS, limited, row)) == ["<|im_start|>Add 1.one[[\n]]"]


def test_prompts(encoder):
    row = {"prompt": "Add 1 and 1:", "answer": 2, "note": {"a": ["ü"]}}
    item = read(GRPO, {}, row)
    assert marked(encoder, item) == ["Add 1 and 1:"]
    assert json.loads(item.extra) == {"answer": 2, "note": {"a": ["ü"]}}
    row = {"messages": talk("q"), "system": "s", "answer": "x"}
    for dataset in ({}, {"type": "chat_template"}):
        item = read(GRPO, dataset, row)
        assert marked(encoder, item) == [chatml("q", "", "s").split("[[")[0]]
        assert json.loads(item.extra) == {"answer": "x"}


@pytest.mark.parametrize(
    ("method", "dataset", "row", "message"),
    [
        (DPO, {"type": "chatml.intel"}, {"prompt": "q"}, "no column 'question'.*field_prompt"),
        (DPO, {}, {"prompt": "q", "chosen": "a"}, "no column 'rejected'.*field_rejected"),
        (DPO, {}, {"prompt": "q", "chosen": None, "rejected": "b"}, "'chosen' must hold text"),
        (DPO, {}, {"prompt": "q", "chosen": 3.5, "rejected": []}, "'rejected' holds no message"),
        (DPO, {"type": "chatml.argilla_chat"}, {"chosen": "a", "rejected": "b"}, "a dialogue"),
        (DPO, {"type": "zephyr.nectar"}, {"prompt": "q", "answers": [{}, {}]}, "number `rank`"),
        (DPO, {"field_prompt": "x"}, {"prompt": "q", "chosen": "a", "rejected": "b"}, "column 'x'"),
        (KTO, {}, {"prompt": "q", "completion": "c"}, "no column 'label'.*field_label"),
        (KTO, {}, {"messages": talk("q"), "label": True}, "a prompt and an answer"),
        (STEPS, {}, {"prompt": "q", "completions": ["a"], "labels": []}, "not empty"),
        (
            STEPS,
            {},
            {"prompt": "q", "completions": ["a"], "labels": [1, 0]},
            "1 steps and 2 labels",
        ),
        (STEPS, {}, {"prompt": "q", "completions": [5], "labels": [1]}, "step 0 must be text"),
        (GRPO, {}, {"prompt": ""}, "'prompt' is empty"),
        (GRPO, {}, {"question": "q"}, "no column 'prompt'.*field_prompt"),
    ],
)
def test_malformed_rows_are_explained(method, dataset, row, message):
    with pytest.raises(RowError, match=message):
        read(method, dataset, row)


def test_own_function_gives_rows_their_form(encoder, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def gsm8k(row):\n"
        "    answer = row['answer'].split('#### ')[-1]\n"
        "    return {'prompt': [{'role': 'user', 'content': row['question']}], 'answer': answer}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    dataset = {"type": "my_rewards.gsm8k", "trust_remote_code": True}
    item = read(GRPO, dataset, {"question": "q", "answer": "so #### 4"})
    assert marked(encoder, item)[0].endswith(chatml("q", "").split("[[")[0])
    assert json.loads(item.extra) == {"answer": "4"}


def test_every_name_is_read_by_a_format():
    for kind, names in KIND_TYPES.items():
        for name in names:
            module = FORMATS[format_name(name, "datasets.0", kind)]
            wanted = "preference" if kind == "reward" else kind
            assert wanted == module.KIND
            forms = getattr(module, "SOURCES", None)
            assert forms is None or name in forms
    preference = FORMATS["preference"]
    assert chat_options(preference.Options()) is not None
