"""The rules that keep the code findable: who may import whom, and how large a file may grow."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LONGEST

ROOT = Path(__file__).parent.parent
FOLDERS = ("configs", "flows", "infra", "kernels", "tasks")
MAY_IMPORT = {
    "configs": set(),
    "kernels": set(),
    "infra": set(),
    "tasks": {"configs", "kernels", "infra"},
    "flows": {"configs", "tasks", "infra"},
}
SINGLE_IMPORTERS = {
    "mlflow": {"infra/tracking.py"},
    "fsspec": {"infra/store.py"},
    "matplotlib": {"tasks/figures.py"},
    "ray": {"tasks/train/ray_cluster.py"},
}
STAGES = ("prepare", "train", "merge", "quantize", "evaluate", "publish")
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc", "base"}
# Design, section 6: the codebases we learn from keep 90 % of files and functions below these.
MOST_LINES, MOST_FUNCTION_LINES = 500, 50


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    return {name for name in imports(path) if name.startswith("regrow.")}


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_folder_imports_only_what_it_may(path):
    folder = path.relative_to(ROOT).parts[0]
    others = {name.split(".")[1] for name in own_imports(path)} - {folder}
    assert others <= MAY_IMPORT[folder]


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_each_outside_system_has_one_importer(path):
    packages = {name.split(".")[0] for name in imports(path)}
    for package, allowed in SINGLE_IMPORTERS.items():
        assert package not in packages or name_of(path) in allowed, package
    assert "prefect" not in packages or path.is_relative_to(ROOT / "flows")


def test_environment_is_read_in_one_place():
    readers = {
        name_of(path)
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in {"environ", "getenv", "putenv"}
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
    }
    assert readers == {"infra/settings.py"}


@pytest.mark.parametrize("path", sorted((ROOT / "tasks").rglob("*.py")), ids=name_of)
def test_stage_never_imports_another_stage(path):
    part = path.relative_to(ROOT / "tasks").parts[0]
    if part not in STAGES:
        return
    others = {name.split(".")[2] for name in own_imports(path) if name.startswith("regrow.tasks.")}
    assert not others & (set(STAGES) - {part})


def test_configs_import_pydantic_and_yaml_only():
    outside = {
        name.split(".")[0] for path in (ROOT / "configs").rglob("*.py") for name in imports(path)
    }
    allowed = {"pydantic", "pydantic_core", "yaml", "regrow"}
    assert outside - set(sys.stdlib_module_names) <= allowed


def test_kernels_import_torch_and_triton_only():
    outside = {
        name.split(".")[0] for path in (ROOT / "kernels").rglob("*.py") for name in imports(path)
    }
    # These bring kernels that packed attention chooses where they are installed.
    allowed = {"torch", "triton", "flash_attn", "flash_attn_interface", "cudnn", "regrow"}
    assert outside - set(sys.stdlib_module_names) <= allowed


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_file_has_one_readable_size_and_says_its_job(path):
    text = path.read_text()
    if path.name == "__init__.py":
        assert text == ""
        return
    assert len(text.splitlines()) <= MOST_LINES
    assert path.stem not in FORBIDDEN_NAMES
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "the first sentence of a file says its one job"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < MOST_FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_no_attribute_of_another_package_is_assigned(path):
    """No monkeypatching: nothing is assigned to an attribute of an imported name."""
    tree = ast.parse(path.read_text())
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                assert target.value.id not in imported, ast.unparse(node)


def test_plan_does_not_load_torch():
    code = (
        "import sys, regrow.tasks.plan\n"
        "heavy = {'torch', 'transformers', 'prefect', 'mlflow', 'pyarrow', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", LONGEST)
def test_a_file_that_begins_first_is_one(name):
    assert len(list((ROOT / "tests").rglob(name))) == 1
