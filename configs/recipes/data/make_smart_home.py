"""Write the quickstart's dataset: what people say to a smart home, and the one line it must answer.

    python configs/recipes/data/make_smart_home.py [FOLDER]

Every phrase below was written for this project (Apache-2.0, like the rest of it). The seed is
fixed, so the files come out byte for byte the same; `tests/test_demo_data.py` holds them to that.
No held-out request and no held-out answer occurs among the training rows.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

SEED = 2024
TRAIN_ROWS = 480
HELD_OUT_ROWS = 100
TRAIN_FILE = "smart_home_train.jsonl"
HELD_OUT_FILE = "smart_home_held_out.jsonl"

SYSTEM = "Answer with the home command."

ROOMS = (
    "kitchen", "bathroom", "bedroom", "living room", "dining room",
    "office", "hallway", "nursery", "garage", "basement",
)  # fmt: skip

# (device, action) -> ways to ask for it. {value} appears where the action needs a number.
COMMANDS = {
    ("lamp", "on"): (
        "turn on the {room} light",
        "switch the lamp on in the {room}",
        "put the lights on in the {room}",
        "light up the {room}",
    ),
    ("lamp", "off"): (
        "turn off the {room} light",
        "switch the lamp off in the {room}",
        "put the lights out in the {room}",
        "kill the lights in the {room}",
    ),
    ("lamp", "set"): (
        "dim the {room} light to {value} percent",
        "set the lamp in the {room} to {value}%",
        "bring the {room} lights to {value} percent",
        "turn the lamp in the {room} down to {value}%",
    ),
    ("heating", "on"): (
        "turn on the heating in the {room}",
        "switch the {room} radiator on",
        "start heating the {room}",
        "warm up the {room}",
    ),
    ("heating", "off"): (
        "turn off the heating in the {room}",
        "switch the {room} radiator off",
        "stop heating the {room}",
        "let the {room} cool down",
    ),
    ("heating", "set"): (
        "set the {room} heating to {value} degrees",
        "heat the {room} to {value} degrees",
        "turn the radiator in the {room} to {value}",
        "keep the {room} at {value} degrees",
    ),
    ("blinds", "open"): (
        "open the {room} blinds",
        "raise the blinds in the {room}",
        "pull up the shades in the {room}",
        "let some daylight into the {room}",
    ),
    ("blinds", "close"): (
        "close the {room} blinds",
        "lower the blinds in the {room}",
        "pull down the shades in the {room}",
        "shut the sun out of the {room}",
    ),
    ("blinds", "set"): (
        "set the {room} blinds to {value} percent",
        "move the blinds in the {room} to {value}%",
        "put the {room} shades at {value} percent",
    ),
    ("speaker", "on"): (
        "play some music in the {room}",
        "put some music on in the {room}",
        "turn on the {room} speaker",
        "start the radio in the {room}",
    ),
    ("speaker", "off"): (
        "stop the music in the {room}",
        "turn off the {room} speaker",
        "silence the radio in the {room}",
        "switch the music off in the {room}",
    ),
    ("speaker", "set"): (
        "set the {room} volume to {value} percent",
        "turn the music in the {room} to {value}%",
        "put the {room} speaker at {value} percent",
    ),
    ("fan", "on"): (
        "turn on the {room} fan",
        "start the fan in the {room}",
        "get some air moving in the {room}",
    ),
    ("fan", "off"): (
        "turn off the {room} fan",
        "stop the fan in the {room}",
        "switch the fan in the {room} off",
    ),
    ("fan", "set"): (
        "set the {room} fan to {value} percent",
        "run the fan in the {room} at {value}%",
        "put the {room} fan on {value} percent",
    ),
}

# What people say when they do not ask but complain; it always means now.
COMPLAINTS = {
    ("lamp", "on"): ("It is too dark in the {room}.", "I can't see a thing in the {room}."),
    ("lamp", "off"): ("Nobody needs a light in the {room}.", "We forgot the lamp in the {room}!"),
    ("heating", "on"): ("It is freezing in the {room}.", "The {room} is so cold."),
    ("heating", "off"): ("It is far too hot in the {room}.", "Nobody needs the {room} heated."),
    ("blinds", "open"): ("I want to see the sky from the {room}.",),
    ("blinds", "close"): ("The neighbours can look into the {room}.",),
    ("speaker", "on"): ("It is too quiet in the {room}.",),
    ("speaker", "off"): ("No more music in the {room}!",),
    ("fan", "on"): ("The air in the {room} is so stuffy.",),
    ("fan", "off"): ("That fan in the {room} is too noisy.",),
}
COMPLAINT_SHARE = 0.25

# {ask} is a command with its time.
FRAMES = (
    "{ask}.",
    "{ask}, please.",
    "{ask}, thank you.",
    "{ask}, would you?",
    "Please {ask}.",
    "Could you {ask}?",
    "Can you {ask} for me?",
    "Would you {ask}, please?",
    "Hey, {ask}.",
    "Hello house, {ask}.",
    "Okay, {ask}.",
    "I'd like you to {ask}.",
    "I need you to {ask}.",
    "I want you to {ask}.",
    "Go ahead and {ask}.",
    "Do me a favour and {ask}.",
    "Don't forget to {ask}.",
    "Make sure to {ask}.",
    "It would be nice if you could {ask}.",
    "Is it possible to {ask}?",
    "My hands are full, so {ask}.",
    "We have guests, so {ask}.",
    "The baby is asleep, so please {ask}.",
    "I am already on the sofa. Can you {ask}?",
    "Mum asked whether you could {ask}.",
    "I nearly forgot: {ask}.",
    "Sorry to bother you, but could you {ask}?",
    "One more thing, {ask}.",
    "If you don't mind, {ask}.",
    "Before I change my mind, {ask}.",
)
NOW = ("", "", "", " now", " right now", " straight away")
NOW_SHARE = 0.5
CLOCK_WORDS = {"12:00": "noon", "00:00": "midnight"}
CLOCK_WORD_SHARE = 0.2
MINUTES = ("00", "15", "30", "45")
PERCENTS = range(5, 100, 5)
DEGREES = range(15, 26)


@dataclass(frozen=True)
class Command:
    """What one request means. `value` is a percentage, or degrees Celsius for the heating."""

    device: str
    room: str
    action: str
    value: int | None
    time: str
    """HH:MM, or "now"."""

    def line(self) -> str:
        """The answer the model must learn."""
        value = "none" if self.value is None else self.value
        return (
            f"device={self.device}; room={self.room}; action={self.action};"
            f" value={value}; time={self.time}"
        )


def draw_command(rng: random.Random) -> Command:
    """A random command; a number only where the action takes one."""
    device, action = rng.choice(list(COMMANDS))
    value = rng.choice(DEGREES if device == "heating" else PERCENTS) if action == "set" else None
    time = f"{rng.randrange(24):02}:{rng.choice(MINUTES)}"
    if rng.random() < CLOCK_WORD_SHARE:
        time = rng.choice(list(CLOCK_WORDS))
    if rng.random() < NOW_SHARE:
        time = "now"
    return Command(device, rng.choice(ROOMS), action, value, time)


def say_time(command: Command, rng: random.Random) -> str:
    """The command's time in words, with a space before it; may be empty for now."""
    if command.time == "now":
        return rng.choice(NOW)
    return f" at {CLOCK_WORDS.get(command.time, command.time)}"


def say(command: Command, rng: random.Random) -> str:
    """One way a person may ask for the command."""
    kind = (command.device, command.action)
    if command.time == "now" and kind in COMPLAINTS and rng.random() < COMPLAINT_SHARE:
        return rng.choice(COMPLAINTS[kind]).format(room=command.room)
    ask = rng.choice(COMMANDS[kind]).format(room=command.room, value=command.value)
    text = rng.choice(FRAMES).format(ask=ask + say_time(command, rng))
    return text[0].upper() + text[1:]


def rows(commands: dict[str, Command]) -> list[dict]:
    """Request -> command, as chats in the `messages` form that `type: chat_template` reads."""
    return [
        {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": request},
                {"role": "assistant", "content": command.line()},
            ]
        }
        for request, command in commands.items()
    ]


def make(seed: int = SEED) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows): all requests differ, no held-out answer is in training."""
    rng = random.Random(seed)
    held_out: dict[str, Command] = {}
    while len(held_out) < HELD_OUT_ROWS:
        command = draw_command(rng)
        if command not in held_out.values():
            held_out[say(command, rng)] = command
    kept_back = set(held_out.values())
    train: dict[str, Command] = {}
    while len(train) < TRAIN_ROWS:
        command = draw_command(rng)
        if command not in kept_back:
            train[say(command, rng)] = command
    return rows(train), rows(held_out)


def write(folder: Path) -> None:
    """Both files, as JSON lines, into `folder`."""
    for name, chats in zip((TRAIN_FILE, HELD_OUT_FILE), make(), strict=True):
        lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in chats)
        (folder / name).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
