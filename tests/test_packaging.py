"""The package list equals the tree, and our folders never shadow other people's packages."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("configs", "flows", "infra", "kernels", "tasks")


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {f"regrow.{folder}" for folder in FOLDERS}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("__init__.py"):
            found.add("regrow." + ".".join(path.parent.relative_to(ROOT).parts))
    data_only = {
        "regrow.configs.deepspeed",
        "regrow.configs.recipes",
        "regrow.configs.recipes.data",
        "regrow.tasks.prepare.chat_templates",
    }
    assert set(listed) - data_only == found


def test_the_five_folders_are_namespaces():
    assert not [folder for folder in FOLDERS if (ROOT / folder / "__init__.py").exists()]


def test_our_kernels_folder_is_not_imported_as_kernels():
    code = (
        "import sys, transformers; from transformers import LlamaForCausalLM\n"
        "module = sys.modules.get('kernels')\n"
        "print(getattr(module, '__file__', None))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert str(ROOT) not in done.stdout


def test_console_script_answers_from_another_directory(tmp_path):
    script = Path(sys.executable).parent / "regrow"
    done = subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert "run" in done.stdout
