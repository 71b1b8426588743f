"""The formulas give the bytes that the autograd graphs of real layers hold."""

import importlib.util
from pathlib import Path

import pytest

from regrow.tasks.forecast.activations import CPU, Compute, Layer, layer_bytes
from regrow.tasks.forecast.trainable import all_weights, with_adapter
from regrow.tasks.modeling.adapter_settings import AdapterSettings

_spec = importlib.util.spec_from_file_location("meters", Path(__file__).with_name("meters.py"))
assert _spec is not None
assert _spec.loader is not None
meters = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(meters)

LORA = {"r": 8, "alpha": 16, "target_linear": True}
WAYS = {
    "full": None,
    "lora": LORA,
    "lora, dropout": LORA | {"dropout": 0.1},
    "dora": LORA | {"dora": True},
    "lora on q and v": {"r": 8, "alpha": 16, "target_modules": ("q_proj", "v_proj")},
}
SHAPES = {
    "llama": {},
    "llama, wide": {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"attn_logit_softcapping": 0.0},
    "gemma3_text": {},
    "olmo2": {"head_dim": None},
    "phi3": {"head_dim": None},
    "granite": {"head_dim": None},
}
# Of the kernels those that keep on the CPU what they keep on a GPU: the others fall back there.
FUSED = ("attention", "mlp")


def per_layer(kind, adapter, kernels=(), **config):
    """(counted, computed) bytes a token that one more layer keeps."""
    found = []
    for layers in (2, 3):
        model, shape = meters.build(kind, adapter, kernels, num_hidden_layers=layers, **config)
        found.append(meters.kept_bytes(model, meters.batch(shape.vocabulary)))
    trainable = with_adapter(shape, AdapterSettings(**adapter)) if adapter else all_weights(shape)
    compute = Compute(frozenset(kernels), machine=CPU)
    layer = Layer(shape, shape.layer(2), trainable, compute)
    computed = layer_bytes(layer) * meters.TOKENS
    if adapter:
        casts = 2 * trainable.adapter // shape.layers
    else:
        casts = 0 if kernels else sum(2 * w.numel for w in layer.weights if w.kind == "linear")
    # On the CPU the kernel's reference keeps the angles of queries and of keys, in float32.
    angles = 8 * shape.attention.head_size * meters.TOKENS if kernels else 0
    return found[1] - found[0], computed + casts + angles


@pytest.mark.parametrize(
    ("name", "way"),
    [*(("llama", way) for way in WAYS), *((n, w) for n in SHAPES for w in ("full", "lora"))],
)
def test_a_layer_keeps_what_is_computed(name, way):
    counted, computed = per_layer(name.partition(",")[0], WAYS[way], **SHAPES[name])
    assert computed == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("way", ["full", "lora", "lora, dropout"])
@pytest.mark.parametrize("name", ["llama, wide", "phi3"])
def test_a_layer_with_kernels_keeps_what_is_computed(name, way):
    counted, computed = per_layer(name.partition(",")[0], WAYS[way], FUSED, **SHAPES[name])
    assert computed == pytest.approx(counted, rel=0.05)
