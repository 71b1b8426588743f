"""Exactly the words to be learnt are learnt, whatever the template does to them."""

import functools
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from regrow.tasks.prepare.encoding import Encoder
from regrow.tasks.prepare.example import Conversation, Document, RowError, Segment
from regrow.tasks.prepare.masking import Masker, MaskRules
from regrow.tasks.prepare.rendering import ChatTemplate
from regrow.tasks.prepare.templates import TEMPLATES
from regrow.tasks.prepare.tokenizer import SavedTokenizer, save_tokenizer
from regrow.tasks.stage import StageError

TRIM = ("llama3", "mistral", "gemma", "cohere", "vicuna")
"""Templates that strip answers."""

SPECIALS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "mistral": ("<s>", "</s>", "[INST]", "[/INST]"),
    "gemma": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "alpaca": ("<s>", "</s>"),
    "phi_3": ("<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    "deepseek_v2": ("<bos>", "<eos>", "<｜User｜>", "<｜Assistant｜>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "mistral_v7_tekken": ("<s>", "</s>", "[INST]", "[/INST]"),
    "cohere": (
        *("<bos>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>"),
        *("<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    ),
    "vicuna": ("<s>", "</s>"),
}
"""Template -> its begin and end of text, and other special tokens."""

DROPS_EARLIER = (
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
STRIPS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% if loop.last %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 }}"
    "\n</think>\n\n{% endif %}{{ parts[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS_TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.content %}\n{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}\n<call>{{ c.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)
NO_END = "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n\n{% endfor %}"


def turns(*pairs: tuple[str, str], train: tuple[str, ...] = ("assistant",)) -> Conversation:
    messages = tuple({"role": role, "content": content} for role, content in pairs)
    return Conversation(messages, tuple(m["role"] in train for m in messages))


def trained_texts(
    template: str, conversation: Conversation, eos: str = "<|im_end|>", **rules
) -> list[str]:
    """The trained pieces of the rendered text."""
    masker = Masker(ChatTemplate(template, {}), MaskRules(**rules), eos, SPECIALS["chatml"])
    rendered = masker.render(conversation)
    return [rendered.text[start:stop] for start, stop in rendered.spans]


QUESTION = ("user", "1 + 1?")


@pytest.mark.parametrize(
    ("train_on_eos", "expected"),
    [
        ("turn", ["a<|im_end|>", "b<|im_end|>"]),
        ("all", ["<|im_end|>", "a<|im_end|>", "<|im_end|>", "b<|im_end|>"]),
        ("last", ["a", "b<|im_end|>"]),
        ("none", ["a", "b"]),
    ],
)
def test_end_tokens_follow_train_on_eos(train_on_eos, expected):
    conversation = turns(QUESTION, ("assistant", "a"), QUESTION, ("assistant", "b"))
    rules = {"train_on_eos": train_on_eos, "train_on_eot": train_on_eos}
    assert trained_texts(TEMPLATES["chatml"], conversation, **rules) == expected


def test_end_of_turn_token_has_its_own_rule():
    conversation = turns(QUESTION, ("assistant", "a"))
    own = {"eot_tokens": ("<|im_end|>",), "train_on_eos": "turn"}
    chatml = TEMPLATES["chatml"]
    assert trained_texts(chatml, conversation, eos="</s>", train_on_eot="none", **own) == ["a"]
    ended = trained_texts(chatml, conversation, eos="</s>", train_on_eot="turn", **own)
    assert ended == ["a<|im_end|>"]


def test_end_of_turn_is_found_where_it_is_not_the_eos_token():
    found = trained_texts(TEMPLATES["chatml"], turns(QUESTION, ("assistant", "a")), eos="</s>")
    assert found == ["a<|im_end|>"]


def test_beginning_of_a_turn_is_not_taken_for_an_end():
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    conversation = turns(QUESTION, ("assistant", "a"), QUESTION, ("assistant", "b"))
    assert trained_texts(template, conversation, eos="</s>") == ["a", "b"]


def test_missing_end_is_counted():
    masker = Masker(ChatTemplate(NO_END, {}), MaskRules(), "</s>", ())
    rendered = masker.render(turns(QUESTION, ("assistant", "a"), ("assistant", "b")))
    assert [rendered.text[s:e] for s, e in rendered.spans] == ["a", "b"]
    assert rendered.unended == 2


def test_earlier_answers_that_the_template_drops_are_not_learnt():
    conversation = turns(QUESTION, ("assistant", "gone"), QUESTION, ("assistant", "kept"))
    assert trained_texts(DROPS_EARLIER, conversation) == ["kept<|im_end|>"]


def test_answer_equal_to_the_question_is_found_in_its_own_place():
    conversation = turns(("user", "yes"), ("assistant", "yes"))
    masker = Masker(ChatTemplate(TEMPLATES["chatml"], {}), MaskRules(), "<|im_end|>", ())
    rendered = masker.render(conversation)
    assert rendered.spans == [(rendered.text.rindex("yes"), len(rendered.text) - 1)]


def test_thinking_is_learnt_where_it_is_printed_and_only_there():
    first, last = "<think>\nhm\n</think>\n\nfour", "<think>\nwell\n</think>\n\nfive"
    conversation = turns(QUESTION, ("assistant", first), QUESTION, ("assistant", last))
    assert trained_texts(STRIPS_THINKING, conversation) == [
        "four<|im_end|>",
        "<think>\nwell\n</think>\n\nfive<|im_end|>",
    ]


def test_empty_thinking_that_the_template_adds_is_not_learnt():
    assert trained_texts(STRIPS_THINKING, turns(QUESTION, ("assistant", "five"))) == [
        "five<|im_end|>"
    ]


def test_tool_calls_are_learnt_with_their_frame():
    call = {"function": {"name": "add", "arguments": {"a": 1, "b": 1}}}
    messages = (
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2"},
    )
    conversation = Conversation(messages, (False, True, False, True))
    framed = '\n<call>{"name": "add", "arguments": {"a": 1, "b": 1}}</call><|im_end|>'
    assert [t.lstrip("\n") for t in trained_texts(CALLS_TOOLS, conversation)] == [
        framed.lstrip("\n"),
        "2<|im_end|>",
    ]


@pytest.mark.parametrize("content", ["  both\n", "\tleft", "right \n\n"])
def test_stripped_content_is_learnt_as_printed(content):
    template = (
        "{% for m in messages %}<{{ m.role }}>\n{{ m.content | trim }}\n<|im_end|>{% endfor %}"
    )
    found = trained_texts(template, turns(QUESTION, ("assistant", content)))
    assert found == [f"{content.strip()}\n<|im_end|>"]


@pytest.mark.parametrize("content", ["  both\n", "\tleft", "right \n\n", " "])
def test_white_space_that_is_printed_is_learnt(content):
    found = trained_texts(TEMPLATES["chatml"], turns(QUESTION, ("assistant", content)))
    assert found == [f"{content}<|im_end|>"]


def test_template_that_changes_the_words_is_followed():
    template = "{% for m in messages %}[{{ m.content | upper }}]<|im_end|>{% endfor %}"
    assert trained_texts(template, turns(QUESTION, ("assistant", "shout"))) == [
        "SHOUT]<|im_end|>"[:5]
    ]


def test_place_that_cannot_be_told_is_refused():
    twice = "{% for m in messages %}{{ m.content }}|{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(RowError, match=r"message 1 \(assistant\).*cannot be trained on exactly"):
        trained_texts(twice, turns(QUESTION, ("assistant", "a")))
    length = "{% for m in messages %}{{ m.content | length }}<|im_end|>{% endfor %}"
    with pytest.raises(RowError, match="cannot be trained on exactly"):
        trained_texts(length, turns(QUESTION, ("assistant", "a")))


def test_content_that_looks_like_the_marks_is_no_trap():
    content = "\ue0f10\ue0f2 \ue0f1\ue0f11\ue0f2"
    found = trained_texts(TEMPLATES["chatml"], turns(("user", content), ("assistant", content)))
    assert found == [f"{content}<|im_end|>"]


@pytest.mark.parametrize("rule", ["turn", "all", "last"])
def test_empty_answer_teaches_nothing(rule):
    """Not to stop at once either; Axolotl's rule (it finds no turn and trains none of it)."""
    conversation = turns(QUESTION, ("assistant", ""), QUESTION, ("assistant", "b"))
    found = trained_texts(TEMPLATES["chatml"], conversation, train_on_eos=rule, train_on_eot=rule)
    assert found[-1] == "b<|im_end|>"
    assert "".join(found).count("<|im_end|>") == (3 if rule == "all" else 1)


def test_last_end_is_that_of_the_last_trained_message():
    conversation = turns(QUESTION, ("assistant", "a"), QUESTION, ("assistant", "b"), QUESTION)
    rules = {"train_on_eos": "last", "train_on_eot": "last"}
    assert trained_texts(TEMPLATES["chatml"], conversation, **rules) == ["a", "b<|im_end|>"]


def test_turn_of_the_user_is_not_taken_for_an_end():
    """Metharme ends no answer but the last; what follows the others begins the user's turn."""
    template = ChatTemplate(TEMPLATES["metharme"], {"bos_token": "<s>", "eos_token": "</s>"})
    masker = Masker(template, MaskRules(), "</s>", ("<s>", "</s>", "<|user|>", "<|model|>"))
    rendered = masker.render(turns(QUESTION, ("assistant", "a"), QUESTION, ("assistant", "b")))
    assert [rendered.text[s:e] for s, e in rendered.spans] == ["a", "b</s>"]
    assert rendered.unended == 1


def test_both_of_two_ends_are_learnt_and_not_the_line_between():
    """Phi 3's own template: <|end|>, a newline and, at the very end, <|endoftext|>."""
    text = TEMPLATES["phi_35"] + "{{ '<|endoftext|>' }}"
    ends = ("<|end|>", "<|endoftext|>", "<|user|>", "<|assistant|>")
    masker = Masker(ChatTemplate(text, {}), MaskRules(), "<|endoftext|>", ends)
    rendered = masker.render(turns(QUESTION, ("assistant", "a")))
    assert [rendered.text[s:e] for s, e in rendered.spans] == ["a<|end|>", "<|endoftext|>"]


def test_space_that_the_model_has_to_write_is_learnt():
    """Mistral prints a space before an answer that is not in the prompt, Llama 2 one before </s>;
    a prompt that ends with the space itself leaves nothing to learn."""
    mistral = TEMPLATES["mistral_v1"]
    spaced = mistral.replace(
        "message['content'] + eos_token", "message['content'] + ' ' + eos_token"
    )
    for text, expected in ((mistral, " 4</s>"), (spaced, " 4 </s>")):
        template = ChatTemplate(text, {"bos_token": "<s>", "eos_token": "</s>"})
        rendered = Masker(template, MaskRules(), "</s>", ("<s>", "</s>")).render(
            turns(QUESTION, ("assistant", "4"))
        )
        assert [rendered.text[s:e] for s, e in rendered.spans] == [expected]


# ---- with real tokens


@pytest.fixture(scope="module")
def saved_for(smollm2_dir, tmp_path_factory):
    """Template name -> SmolLM2's tokenizer with that template's special tokens."""

    @functools.cache
    def make(name: str) -> SavedTokenizer:
        bos, eos, *others = SPECIALS[name]
        return save_tokenizer(
            str(smollm2_dir),
            tmp_path_factory.mktemp(name),
            special_tokens={
                "bos_token": bos,
                "eos_token": eos,
                "additional_special_tokens": tuple(others),
            },
            tokens=(),
            chat_template=TEMPLATES[name],
            fallback_template=None,
            trust_remote_code=False,
        )

    return make


@pytest.fixture(scope="module")
def encoder_for(saved_for):
    """Template name -> an encoder for it."""
    return functools.cache(lambda name: Encoder(saved_for(name), TEMPLATES[name], MaskRules()))


def spells(encoder: Encoder, text: str) -> bool:
    ids = encoder._backend.encode(text, add_special_tokens=False).ids
    return encoder._backend.decode(ids, skip_special_tokens=False) == text


def runs(encoder: Encoder, example) -> list[str]:
    """The text of each run of trained tokens."""
    tokens = encoder.encode(example)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], tokens.loss_mask, [0]])))
    return [
        encoder._backend.decode(tokens.input_ids[a:b].tolist(), skip_special_tokens=False)
        for a, b in edges.reshape(-1, 2)
    ]


NASTY = [
    "<|im_end|>",
    "</s>",
    "\n",
    "  ",
    "### Response:\n",
    "🦊",
    "é\u0301",
    "\ue0f1",
    "한",
    "\r\n",
]
CHARACTERS = st.characters(exclude_categories=["Cs", "Cc"], max_codepoint=0x1FFFF)
TEXT = st.lists(
    st.one_of(st.text(CHARACTERS, max_size=8), st.sampled_from(NASTY)),
    max_size=5,
).map("".join)
DIALOGUES = st.tuples(
    st.one_of(st.none(), TEXT), st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)
)


@pytest.mark.parametrize("name", SPECIALS)
def test_trained_tokens_spell_the_answers(encoder_for, name):
    encoder = encoder_for(name)
    eos = "<end_of_turn>" if name == "gemma" else SPECIALS[name][1]
    trims = name in TRIM

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(DIALOGUES)
    def check(dialogue):
        system, pairs = dialogue
        messages = [("system", system)] if system is not None else []
        for question, answer in pairs:
            messages += [("user", question), ("assistant", answer)]
        # SmolLM2's vocabulary lacks some bytes, so it cannot spell every character.
        assume(all(spells(encoder, text) for _, text in messages))
        learnt = runs(encoder, turns(*messages))
        answers = [answer.strip() if trims else answer for _, answer in pairs]
        if name == "qwen3":  # prints the last answer behind its thinking
            answers[-1] = answers[-1].lstrip("\n")
        answers = [answer for answer in answers if answer]  # an empty one teaches nothing
        assert len(learnt) == len(answers)
        for text, answer in zip(learnt, answers, strict=True):
            expected = answer + eos
            # The first token may reach back over white space that the template puts before it.
            assert text.endswith(expected)
            assert not text.removesuffix(expected).strip()

    check()


def test_golden_tokens_of_smollm2(saved_for, smollm2_dir):
    """Pinned: these bytes may change only together with the stage's VERSION."""
    saved = (smollm2_dir / "chat_template.jinja").read_text()
    encoder = Encoder(saved_for("chatml"), saved, MaskRules())
    tokens = encoder.encode(turns(("user", "Hi 🦊"), ("assistant", "Grüße, 12!\n")))
    text = encoder._backend.decode(tokens.input_ids.tolist(), skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi 🦊<|im_end|>\n<|im_start|>assistant\nGrüße, 12!\n"
        "<|im_end|>\n"
    )
    learnt = tokens.input_ids[tokens.loss_mask == 1].tolist()
    assert encoder._backend.decode(learnt, skip_special_tokens=False) == "Grüße, 12!\n<|im_end|>"
    assert tokens.input_ids.tolist() == GOLDEN_IDS
    assert tokens.loss_mask.tolist() == [0] * GOLDEN_PROMPT + [1] * GOLDEN_ANSWER + [0]
    assert tokens.prompt_len == GOLDEN_PROMPT


# fmt: off
GOLDEN_IDS = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407,
    19712, 8182, 2, 198, 1, 4093, 198, 26843, 15107, 116, 228, 2, 198, 1, 520, 9531, 198,
    27302, 7170, 34878, 85, 28, 216, 33, 34, 17, 198, 2, 198,
]
# fmt: on
GOLDEN_PROMPT, GOLDEN_ANSWER = 34, 11


def test_ids_are_those_of_transformers(encoder_for, smollm2_dir):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(smollm2_dir)
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "  x\n\n\ty 12345 <|im_end|> é\u0301 한국어 🦊🦊"},
        {"role": "assistant", "content": "\n\n def f():\n\treturn  1\n"},
    ]
    expected = reference.apply_chat_template(messages, chat_template=TEMPLATES["chatml"])
    conversation = Conversation(tuple(messages), (False, False, True))
    ids = encoder_for("chatml").encode(conversation).input_ids.tolist()
    assert ids == list(expected["input_ids"] if hasattr(expected, "keys") else expected)


def test_document_ends_with_a_learnt_eos(encoder_for):
    encoder = encoder_for("chatml")
    document = Document((Segment("Q: 1 + 1?\nA:", False), Segment(" two", True)))
    assert runs(encoder, document) == [" two<|im_end|>"]
    assert runs(encoder, Document((Segment("all of it", True),)))[0].endswith(" of it<|im_end|>")


def test_first_token_is_never_a_target(encoder_for):
    encoder = encoder_for("chatml")
    for document in (Document((Segment("x y", True),)), Document((Segment("", True),))):
        assert encoder.encode(document).loss_mask[0] == 0


def test_conversation_of_nothing_is_no_tokens(encoder_for):
    assert len(encoder_for("chatml").encode(Conversation((), ())).input_ids) == 0


def test_half_a_character_is_refused(encoder_for):
    with pytest.raises(RowError, match="surrogate"):
        encoder_for("chatml").encode(Document((Segment("\ud83e", True),)))


def test_white_space_tokens_keep_their_characters(encoder_for):
    """Offsets that leave white space out would leave it unlearnt."""
    answer = "a    b\n\n\n  "
    assert runs(encoder_for("chatml"), turns(QUESTION, ("assistant", answer))) == [
        answer + "<|im_end|>"
    ]


@pytest.mark.parametrize("scheme", ["first", "always", "normalizer"])
def test_sentencepiece_tokens_reach_back_over_the_space_only(tmp_path, scheme):
    """Llama 2's and Mistral's kind: a word carries the space in front of it."""
    path = tmp_path / "tokenizer.json"
    path.write_text(sentencepiece_like(scheme))
    special = (("bos_token", "<s>"), ("eos_token", "</s>"))
    saved = SavedTokenizer(str(path), "</s>", 2, special, ("<s>", "</s>"), None)
    encoder = Encoder(saved, TEMPLATES["mistral"], MaskRules())
    conversation = turns(
        ("user", "the quick"), ("assistant", "fox 🦊é  x"), ("user", "says"), ("assistant", "brown")
    )
    assert [text.lstrip() for text in runs(encoder, conversation)] == [
        "fox 🦊é  x</s>",
        "brown</s>",
    ]
    tokens = encoder.encode(conversation)
    before = encoder._backend.decode(tokens.input_ids[: tokens.prompt_len].tolist())
    assert before.endswith("[/INST]")
    document = Document((Segment("the quick ", False), Segment("brown", True)))
    assert [text.lstrip() for text in runs(encoder, document)] == ["brown</s>"]
    assert encoder.encode(document).input_ids[0] == 1


def sentencepiece_like(scheme: str) -> str:
    """tokenizer.json of a small BPE with byte fallback, as converted from SentencePiece."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    # Learnt word by word, so that no token spans two.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    named = ["<unk>", "<s>", "</s>"]
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=named + spelled, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox says hello"] * 9, trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in named]
    data["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(data))
    if scheme == "normalizer":
        prepend, replace = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([prepend, replace])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    space = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tokenizer.to_str()


def test_one_token_has_one_rule():
    """Axolotl refuses it as well: the one rule would undo the other."""
    conversation = turns(QUESTION, ("assistant", "a"))
    with pytest.raises(StageError, match="train_on_eot: none, and train_on_eos: turn"):
        trained_texts(TEMPLATES["chatml"], conversation, train_on_eot="none")
