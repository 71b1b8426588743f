"""What mistral-common writes is learnt exactly where its answers are, or the row is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from regrow.tasks.modeling.rows import PackedRows
from regrow.tasks.prepare.example import Conversation, Document, RowError, Segment
from regrow.tasks.prepare.formats import chat_template
from regrow.tasks.prepare.masking import MaskRules
from regrow.tasks.prepare.mistral import MistralEncoder, save_mistral_tokenizer
from regrow.tasks.prepare.tokenizer import SavedTokenizer
from regrow.tasks.stage import StageError

from .conftest import Workbench

mistral_common = pytest.importorskip("mistral_common")
DATA = Path(mistral_common.__file__).parent / "data"

CALL = {
    "role": "assistant",
    "tool_calls": [
        {
            "id": "abcdefghi",
            "type": "function",
            "function": {"name": "f", "arguments": {"a": 1}},
        }
    ],
}
RESULT = {"role": "tool", "content": "42", "tool_call_id": "abcdefghi", "name": "f"}
TOOLS = (
    {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
    },
)


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


def saved(tekken: Path) -> SavedTokenizer:
    return SavedTokenizer("", "</s>", 2, (), (), None, str(tekken))


@pytest.fixture(scope="session")
def thinking_tekken(tmp_path_factory) -> Path:
    """The newest tekken file of the package as one of version 13 with tokens for thinking."""
    data = json.loads((DATA / "tekken_240911.json").read_text())
    config = data["config"] | {"version": "v13"}
    config["default_vocab_size"] = 9000 + config["default_num_special_tokens"]
    names = [
        "<unk>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
        "[TOOL_CALLS]",
        "[IMG]",
        "<pad>",
        "[IMG_BREAK]",
        "[IMG_END]",
        "[PREFIX]",
        "[MIDDLE]",
        "[SUFFIX]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[TOOL_CONTENT]",
        "[ARGS]",
        "[CALL_ID]",
        "[THINK]",
        "[/THINK]",
    ]
    special = [
        {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
    ]
    out = tmp_path_factory.mktemp("v13") / "tekken.json"
    made = {"config": config, "vocab": data["vocab"][:9000], "special_tokens": special}
    out.write_text(json.dumps(made))
    return out


@pytest.fixture(scope="session")
def tekkens(thinking_tekken) -> dict[str, Path]:
    return {"v3": DATA / "tekken_240718.json", "v13": thinking_tekken}


@pytest.fixture(scope="session")
def encoder(tekkens):
    made: dict = {}

    def make(version="v13", **rules) -> MistralEncoder:
        key = (version, *sorted(rules.items()))
        made[key] = made.get(key) or MistralEncoder(saved(tekkens[version]), MaskRules(**rules))
        return made[key]

    return make


def conversation(*messages, trained=None, tools=None) -> Conversation:
    flags = [m["role"] == "assistant" for m in messages] if trained is None else trained
    return Conversation(tuple(messages), tuple(flags), tools)


def learnt(encoder: MistralEncoder, source: Conversation) -> list[str]:
    """Each run of learnt tokens as text, control tokens included."""
    (tokens,) = encoder.encode_many([source])
    assert tokens.loss_mask[0] == 0
    edges = np.flatnonzero(np.diff(np.concatenate([[0], tokens.loss_mask, [0]])))
    pieces = [encoder._tekken.id_to_piece(int(i)) for i in tokens.input_ids]
    return ["".join(pieces[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


LONG = conversation(
    {"role": "system", "content": "Be brief."},
    user("What is [INST] and </s>?"),
    says("A mark [/INST] and an end </s>, I think."),
    user("More"),
    says("No."),
)


@pytest.mark.parametrize("version", ["v3", "v13"])
def test_answers_and_their_ends_are_learnt_and_nothing_else(encoder, version):
    """Also where version 3 puts the system text into the last question, and control tokens' names
    in texts are text."""
    made = encoder(version)
    assert learnt(made, LONG) == ["A mark [/INST] and an end </s>, I think.</s>", "No.</s>"]
    (tokens,) = made.encode_many([LONG])
    assert tokens.prompt_len == len(tokens.input_ids) - 1 - len("No.") + 1
    assert tokens.input_ids.dtype == np.int32
    assert tokens.loss_mask.dtype == np.uint8


@pytest.mark.parametrize("version", ["v3", "v13"])
def test_tool_calls_are_learnt_and_results_are_not(encoder, version):
    source = conversation(user("Ask"), CALL, RESULT, says("It is 42."), tools=TOOLS)
    call, answer = learnt(encoder(version), source)
    assert call.startswith("[TOOL_CALLS]")
    assert call.endswith("</s>")
    assert '{"a": 1}' in call
    assert answer == "It is 42.</s>"


def test_thinking_is_learnt_with_its_answer(encoder):
    parts = [{"type": "thinking", "thinking": "Hmm."}, {"type": "text", "text": "Yes."}]
    row = {"messages": [user("Is it?"), {"role": "assistant", "content": parts}]}
    source = chat_template.read(row, chat_template.Options())
    assert learnt(encoder(), source) == ["[THINK]Hmm.[/THINK]Yes.</s>"]
    with pytest.raises(RowError, match="mistral-common refuses"):
        encoder("v3").encode_many([source])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("turn", ["two</s>"]),
        ("all", ["</s>", "two</s>"]),
        ("none", ["two"]),
        ("last", ["two</s>"]),
    ],
)
def test_the_end_is_learnt_by_its_rule(encoder, rule, expected):
    source = conversation(
        user("1"), says("one"), user("2"), says("two"), trained=(False, False, False, True)
    )
    assert learnt(encoder(train_on_eos=rule, train_on_eot=rule), source) == expected


def test_answers_in_a_row_are_one(encoder):
    source = conversation(user("1"), says("one"), says("two"))
    assert learnt(encoder("v3"), source) == ["one\n\ntwo</s>"]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (conversation(user("1")), "refuses this conversation"),
        (conversation(says("1")), "refuses this conversation"),
        (
            conversation(user("1"), says("2"), says("3"), trained=(False, True, False)),
            "only a part is to be learnt",
        ),
        (conversation(user("1"), says("2"), trained=(True, True)), "trains answers alone"),
        (
            conversation(user("1"), says("2") | {"reasoning_content": "hm"}),
            "does not read 'reasoning_content'",
        ),
        (Document((Segment("text", True),)), "is for conversations"),
        (
            Conversation((user("1"), says("2")), (False, True), None, {1: {"content": ((0, 1),)}}),
            "single characters",
        ),
    ],
)
def test_what_cannot_be_exact_is_refused(encoder, source, why):
    with pytest.raises(RowError, match=why):
        encoder("v3").encode_many([source])


def test_the_stage_writes_rows_for_stages_that_know_no_mistral_common(thinking_tekken, tmp_path):
    place = tmp_path / "model"
    place.mkdir()
    shutil.copyfile(thinking_tekken, place / "tekken.json")
    bench = Workbench(tmp_path, place)
    rows = [{"messages": [user(f"Say {i} [INST]"), says(f"It is {i}.")]} for i in range(12)]
    rows.append({"messages": [user("No answer")]})
    prepared = bench.run(
        datasets=[{"path": bench.write("a.jsonl", rows), "type": "chat_template"}],
        tokenizer_use_mistral_common=True,
        val_set_size=2,
        on_bad_rows="drop",
    )
    out = prepared.out / "tokenizer"
    assert (out / "tekken.json").read_bytes() == thinking_tekken.read_bytes()
    assert str(tmp_path) not in (out / "tokenizer_config.json").read_text()
    loaded = AutoTokenizer.from_pretrained(out)
    assert (loaded.eos_token_id, loaded.bos_token_id) == (2, 1)
    packed = PackedRows(prepared.out, "train")
    learnt = []
    for index in range(len(packed)):
        row = packed[index]
        text = loaded.decode(row.input_ids[row.loss_mask == 1].tolist())
        learnt += text.split("</s>")[:-1]
    assert len(learnt) == 10
    assert set(learnt) < {f"It is {i}." for i in range(12)}
    assert sum(prepared.result["refused"].values()) == 1
    prompts = (prepared.out / "prompts.jsonl").read_text().splitlines()
    assert {json.loads(line)["expected"] for line in prompts} == {
        f"It is {i}." for i in range(12)
    } - set(learnt)
    text = "What is 12345 été?\n\n  x"
    tekken = MistralEncoder(saved(out / "tekken.json"), MaskRules())._tekken
    assert loaded(text, add_special_tokens=False)["input_ids"] == tekken.encode(text, False, False)


def test_a_model_without_the_file_says_so(tmp_path):
    with pytest.raises(StageError, match=r"tokenizer_use_mistral_common: .* has no tekken\.json"):
        save_mistral_tokenizer(str(tmp_path), tmp_path / "out")
