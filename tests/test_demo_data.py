"""The quickstart's data: its size and form, all requests different, nothing held out is taught."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "configs" / "recipes" / "data"
ROWS = {"smart_home_train.jsonl": 480, "smart_home_held_out.jsonl": 100}
ANSWER = re.compile(
    r"device=(lamp|heating|blinds|speaker|fan); room=([a-z]+( room)?);"
    r" action=(on|off|set|open|close); value=(none|\d{1,2}); time=(now|\d\d:\d\d)"
)


def chats(name: str) -> list[list[dict]]:
    with (FOLDER / name).open(encoding="utf-8") as file:
        return [json.loads(line)["messages"] for line in file]


def column(name: str, turn: int) -> list[str]:
    return [chat[turn]["content"] for chat in chats(name)]


@pytest.mark.parametrize("name", ROWS)
def test_number_of_rows(name):
    assert len(chats(name)) == ROWS[name]


@pytest.mark.parametrize("name", ROWS)
def test_every_chat_is_system_user_assistant(name):
    for chat in chats(name):
        assert [message["role"] for message in chat] == ["system", "user", "assistant"]
        assert all(message["content"].strip() == message["content"] for message in chat)


@pytest.mark.parametrize("name", ROWS)
def test_every_answer_is_one_line_of_the_fixed_form(name):
    for answer in column(name, 2):
        assert ANSWER.fullmatch(answer), answer


@pytest.mark.parametrize("name", ROWS)
def test_a_number_is_given_exactly_where_the_action_needs_one(name):
    for answer in column(name, 2):
        assert ("action=set" in answer) == ("value=none" not in answer), answer


@pytest.mark.parametrize("name", ROWS)
def test_the_request_names_the_room_the_number_and_the_time(name):
    spoken = {"12:00": "noon", "00:00": "midnight"}
    for request, answer in zip(column(name, 1), column(name, 2), strict=True):
        fields = dict(field.split("=") for field in answer.split("; "))
        assert fields["room"] in request
        assert fields["value"] in ("none", *re.findall(r"\d+", request))
        assert fields["time"] == "now" or spoken.get(fields["time"], fields["time"]) in request


def test_all_requests_differ():
    requests = [request for name in ROWS for request in column(name, 1)]
    assert len(set(requests)) == len(requests)


def test_no_held_out_answer_is_taught():
    train, held_out = (set(column(name, 2)) for name in ROWS)
    assert not train & held_out
    assert len(held_out) == ROWS["smart_home_held_out.jsonl"]


def test_the_requests_are_worded_in_many_ways():
    def wording(request: str, answer: str) -> str:
        room = re.search(r"room=([^;]+)", answer)[1]
        return re.sub(r"\d+", "#", request.replace(room, "ROOM"))

    train = "smart_home_train.jsonl"
    wordings = {wording(*pair) for pair in zip(column(train, 1), column(train, 2), strict=True)}
    assert len(wordings) > 300


def test_the_generator_writes_the_same_bytes(tmp_path):
    subprocess.run(
        [sys.executable, "-I", FOLDER / "make_smart_home.py", tmp_path], check=True, timeout=60
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(ROWS)
    for name in ROWS:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name
