"""Counts every tensor of a training step on a GPU that is not there: a check of the memory model.

    python -m tests.bench.fake_gpu            the settings of tests/bench/memory_table.py
    python -m tests.bench.fake_gpu --only 8b

The layers, adapters, kernels' host code, checkpointing, optimizer and clipping are the worker's;
the tensors are FakeTensors on "cuda", so that an 8B model takes no memory. What operations allocate
and free inside themselves (a GEMM's workspace, FlashAttention's sums) is not seen, nor is the
driver. Needs a C++ compiler, for a dozen lines that let torch's CPU build believe in a CUDA device.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

STAND_IN = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using namespace c10;
const Device kGpu{DeviceType::CUDA, 0};
struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return kGpu; }
  Device getDevice() const override { return kGpu; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, kGpu); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, kGpu); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
struct Hooks final : at::CUDAHooksInterface {
  Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
}  // namespace
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, Guard) }
namespace at { C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, ::Hooks) }
"""
"""Device guards that do nothing, and the word that there is one CUDA device."""


def build_stand_in(folder: Path) -> Path:
    """The compiled `STAND_IN` in a folder."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    source, library = folder / "stand_in.cpp", folder / "stand_in.so"
    source.write_text(STAND_IN)
    words = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch}/include", str(source)]
    words += ["-o", str(library), f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib"]
    subprocess.run([*words, "-lc10", "-ltorch_cpu"], check=True)
    return library


def believe_in_cuda() -> None:
    """Load the stand-in, before anything loads torch, and let our kernels take its tensors."""
    assert "torch" not in sys.modules
    with tempfile.TemporaryDirectory() as folder:
        ctypes.CDLL(str(build_stand_in(Path(folder))))
    import torch

    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *args: True
    torch.cuda.get_device_capability = lambda *args: (9, 0)
    torch.nn.Module._apply = _apply
    from regrow.kernels import backend

    registered = backend.custom_op

    def custom_op(name: str, schema: str, fake: Any, mutates: tuple[str, ...] = ()) -> Any:
        """The operation that torch knows: a FakeTensor takes its `fake`, never a launch."""

        def decorate(function: Any) -> Any:
            registered(name, schema, fake, mutates)(function)
            if name == "linear_cross_entropy":
                return function  # its chunks are what is to be counted
            return getattr(torch.ops.regrow, name)

        return decorate

    backend.custom_op = custom_op
    backend.uses_triton = lambda *args: True
    backend.multiprocessors = lambda device: 132
    from regrow.kernels import linear_cross_entropy

    def losses(logits: Any, grads: Any, targets: Any, *args: Any) -> Any:
        return torch.empty(2, len(targets), device=targets.device).unbind()

    linear_cross_entropy.losses_and_gradients = losses


def _apply(self: Any, function: Any, recurse: bool = True) -> Any:
    """`Module.to` without swapping, which FakeTensors do not stand: parameters are made anew."""
    import torch

    for module in self.modules() if recurse else [self]:
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not hasattr(parameter, "quant_state"):
                moved = function(parameter.detach())
                if moved.dtype != parameter.dtype or moved.device != parameter.device:
                    grad = parameter.requires_grad
                    module._parameters[name] = torch.nn.Parameter(moved, requires_grad=grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = function(buffer)
    return self


# ---- the model ----


def build(case: Any) -> Any:
    """The model as `regrow.tasks.train.model` makes it, on the device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from regrow.tasks.modeling import attention
    from regrow.tasks.modeling.adapter import add_adapter
    from regrow.tasks.modeling.kernels import KERNELS, swap_kernels
    from regrow.tasks.train.trainers.loop import follow_autocast
    from tests.bench.memory_table import MODELS

    attention.register()
    sizes = dict(MODELS[case.model])
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32 if case.adapter is None else torch.bfloat16,
            attn_implementation=attention.NAME,
        )
    model.config.use_cache = False
    if case.way == "qlora":
        _quantize(model)
    if case.adapter is not None:
        model = add_adapter(model, r=16, alpha=32, target_linear=True)
        model.to("cuda")
    swap_kernels(model, KERNELS if case.kernels == "auto" else ())
    follow_autocast(model.get_input_embeddings())
    return model.train()


def optimizer_of(case: Any, model: Any) -> Any:
    """AdamW as `regrow.tasks.train.trainers` makes it; an 8-bit one's state is not counted here."""
    import torch

    from regrow.tasks.modeling.rounded_weights import keep_rounded
    from regrow.tasks.train.trainers import fused_adamw

    fused_adamw.adamw_step = lambda *args, **parts: None  # it moves in place
    trained = [p for p in model.parameters() if p.requires_grad]
    rounded = keep_rounded(model)
    if case.optimizer != "adamw_torch_fused":
        return torch.optim.SGD(trained), rounded
    if case.adapter is None and case.kernels == "auto":
        return fused_adamw.FusedAdamW(trained, max_grad_norm=1.0, rounded=rounded), rounded
    return torch.optim.AdamW(trained, fused=True), rounded


def _quantize(model: Any) -> None:
    """Its linear layers as bitsandbytes' nf4 layers with double quantization."""
    import bitsandbytes
    import torch

    def dense(weight: Any, state: Any) -> Any:
        return torch.empty(state.shape, dtype=torch.bfloat16, device="cuda")

    def linear4bit(layer: Any) -> Any:
        made = kind.__new__(kind)
        torch.nn.Module.__init__(made)
        outputs, inputs = layer.weight.shape
        data = torch.empty(layer.weight.numel() // 2, 1, dtype=torch.uint8, device="cuda")
        scales = torch.empty(layer.weight.numel() // 64, dtype=torch.uint8, device="cuda")
        more = torch.empty(-(-len(scales) // 256) + 256 + 16, device="cuda")
        weight: Any = torch.nn.Parameter(data, requires_grad=False)
        weight.quant_state = SimpleNamespace(shape=(outputs, inputs), held=(scales, more))
        weight.compress_statistics, weight.quant_type = True, "nf4"
        made.weight, made.bias, made.compute_dtype = weight, None, torch.bfloat16
        made.in_features, made.out_features = inputs, outputs
        return made

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any) -> Any:
            ctx.weight = weight
            return torch.nn.functional.linear(x, dense(weight, weight.quant_state))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0] @ dense(ctx.weight, ctx.weight.quant_state), None

    class Linear4bit(bitsandbytes.nn.Linear4bit):
        def forward(self, x: Any) -> Any:
            return Product.apply(x.to(torch.bfloat16), self.weight)

    kind: Any = Linear4bit
    kind.__module__ = "bitsandbytes.nn.modules"
    bitsandbytes.functional.dequantize_4bit = dense  # pyright: ignore[reportAttributeAccessIssue]
    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and name != "lm_head":
            model.set_submodule(name, linear4bit(layer))
    model.is_loaded_in_4bit = True


# ---- the step ----


class Meter:
    """Bytes of the tensors on the device that are alive, and the most there were."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.moment = self.word = ""
        self.peaks: dict[str, int] = {}
        self._seen: set[int] = set()

    def note(self, tensor: Any) -> None:
        import weakref

        storage = tensor.untyped_storage()
        if storage._cdata in self._seen or tensor.device.type != "cuda":
            return
        self._seen.add(storage._cdata)
        # The caching allocator gives out blocks of 512 bytes.
        size = -(-storage.nbytes() // 512) * 512
        self.now += size
        self.peaks[self.word] = max(self.peaks.get(self.word, 0), self.now)
        weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@contextmanager
def metered() -> Iterator[Meter]:
    """Inside, tensors are fake and counted."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    meter = Meter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    meter.note(leaf)
            return out

    with FakeTensorMode(allow_non_fake_inputs=True), Counting():
        yield meter


def batch_of(case: Any, vocabulary: int) -> dict[str, Any]:
    """One micro-batch as `regrow.tasks.modeling.batches` makes it: 60 % of the tokens learnt."""
    import torch

    tokens = case.rows * case.row_tokens
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="cuda")
    length = min(512, case.row_tokens)
    bounds = torch.zeros(tokens // length + 1, dtype=torch.int32, device="cuda")
    found = {"input_ids": ids, "labels": torch.zeros_like(ids), "position_ids": ids.clone()}
    found |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    found |= {"max_length_q": length, "max_length_k": length}
    if case.kernels == "auto":
        found["supervised_rows"] = torch.zeros(int(0.6 * tokens), dtype=torch.int64, device="cuda")
    return found | {"num_items_in_batch": torch.tensor(1, device="cuda")}


@contextmanager
def _waiting(case: Any) -> Iterator[None]:
    """What `regrow.tasks.modeling.offload` does, without streams."""
    import torch

    if case.policy != "offload":
        yield
        return

    newest: deque[Any] = deque(maxlen=2)  # one that stays, one on its way

    def pack(tensor: Any) -> Any:
        rows = tensor.shape[-2] if tensor.dim() > 1 else 0
        if rows != case.rows * case.row_tokens:
            return tensor
        if newest:
            newest[-1]["host"] = newest[-1]["here"].cpu()
        before = newest[-1] if newest else None
        saved = {"here": tensor.detach(), "host": None, "before": before, "done": False}
        if len(newest) == 2:  # it has left
            newest[0]["here"] = None
        newest.append(saved)
        return saved

    def fetched(saved: Any) -> Any:
        if saved["here"] is None:
            saved["here"] = saved["host"].cuda()
        return saved["here"]

    def unpack(saved: Any) -> Any:
        if isinstance(saved, torch.Tensor):
            return saved
        found, saved["done"] = fetched(saved), True
        if saved["host"] is not None:
            saved["here"] = None
        if saved["before"] is not None and not saved["before"]["done"]:
            fetched(saved["before"])
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
    for saved in newest:
        if saved["host"] is not None:
            saved["here"] = None
    newest.clear()


def _mark_layers(model: Any, meter: Meter) -> None:
    """The word for a backward pass is another one from the last layer on."""

    def begin(gradient: Any) -> None:
        meter.word = "layers"

    def watch(layer: Any, args: Any, output: Any) -> None:
        if output.requires_grad:
            output.register_hook(begin)

    layers = [m for name, m in model.named_modules() if name.endswith(".layers")]
    layers[0][-1].register_forward_hook(watch)


def measure(case: Any) -> dict[str, float]:
    """Bytes alive at most in each part of the second step."""
    import torch

    from regrow.tasks.modeling.recompute import checkpoint_arguments, take_smaller_parts

    with metered() as meter:
        meter.word = "making"
        model = build(case)
        how = checkpoint_arguments(case.policy, use_reentrant=False)
        if case.policy == "offload":
            take_smaller_parts(model)
        if how is not None:
            model.activation_checkpointing_enable(how | {"preserve_rng_state": False})
        optimizer, rounded = optimizer_of(case, model)
        _mark_layers(model, meter)
        static = meter.now
        batch = batch_of(case, model.config.vocab_size)
        for _ in range(2):
            meter.peaks.clear()
            for _ in range(case.accumulation):
                meter.word = "forward"
                with torch.autocast("cuda", dtype=torch.bfloat16), _waiting(case):
                    loss = model(**batch).loss
                meter.word = "backward"
                loss.backward()
                del loss
            meter.word = "clip"
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            meter.word = "step"
            optimizer.step()
            optimizer.zero_grad()
            rounded.expire()
    return {"static": static, **meter.peaks, "peak": max(meter.peaks.values())}


def main() -> None:
    """One line for each setting: counted, predicted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--small", action="store_true", help="a small model, for a test")
    options = parser.parse_args()
    believe_in_cuda()
    from regrow.tasks.forecast import activations
    from regrow.tasks.forecast.memory import WORKSPACE
    from tests.bench.memory_table import CASES, GIB, SMALL, predicted

    # What no tensor shows: attention's own sums, and below products' workspaces.
    activations.flash_bytes = lambda layer: 0.0
    for case in SMALL if options.small else CASES:
        if options.only not in case.name:
            continue
        begin = time.monotonic()
        found = measure(case)
        guess = predicted(case)
        if case.optimizer != "adamw_torch_fused":
            found["peak"] += guess.parts["optimizer"]  # its own code was not run
        off = (guess.allocated - WORKSPACE) / found["peak"] - 1
        line = {"name": case.name, "off": round(off, 4), "moment": guess.moment}
        line["predicted"] = round((guess.allocated - WORKSPACE) / GIB, 3)
        line["counted"] = {name: round(size / GIB, 3) for name, size in found.items()}
        line["parts"] = {name: round(size / GIB, 3) for name, size in guess.parts.items()}
        line["seconds"] = round(time.monotonic() - begin)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
