"""What the README says of the code is true."""

import re
from pathlib import Path

import pytest
import yaml

from regrow.configs.faults import RecipeError
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


FEATURES = re.findall(
    r"^\| (.+?) \| `(\w+: .+?|\{.+?\})` \| (yes|not yet) \|$", README, re.MULTILINE
)
SMALL = {
    "base_model": "owner/model",
    "datasets": [{"path": "owner/data", "type": "alpaca"}],
    "learning_rate": 1e-4,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "sequence_len": 512,
}
LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}


def test_feature_table_is_read():
    assert len(FEATURES) > 20


@pytest.mark.parametrize(("feature", "text", "here"), FEATURES, ids=[f[0] for f in FEATURES])
def test_features_that_are_here_are_accepted_and_others_refused(feature, text, here):
    change = yaml.safe_load(text)
    recipe = SMALL | ({} if change.get("adapter", "lora") is None else LORA) | change
    if here == "yes":
        parse_recipe(recipe)
    else:
        with pytest.raises(RecipeError, match=next(iter(change))):
            parse_recipe(recipe)
