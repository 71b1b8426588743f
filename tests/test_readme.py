"""What the README says of the code is true."""

import re
from pathlib import Path

import yaml

from regrow.configs.load import parse_recipe
from regrow.flows.cli import COMMANDS
from tests.file_map import with_file_map

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_file_map_has_each_file_with_its_first_sentence():
    assert with_file_map(README) == README, "run `make reference`"


def test_every_command_is_explained():
    missing = [c.name for c in COMMANDS if f"`regrow {c.name}" not in README]
    assert missing == []


def test_every_make_target_it_names_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make (\w+)`", README)) <= targets


def test_recipes_in_it_are_valid():
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        parse_recipe(yaml.safe_load(block))


def test_links_and_pictures_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [x for x in links if "://" not in x and not (ROOT / x).exists()] == []
