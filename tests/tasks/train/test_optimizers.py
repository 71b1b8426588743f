"""Each optimizer gets its arguments, each parameter its rate, and a missing package is named."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import TrainerCallback

from regrow.configs.optimizers import PACKAGES
from regrow.tasks.modeling import quantization
from regrow.tasks.stage import StageError
from regrow.tasks.train import optimizers
from regrow.tasks.train.files import SavedState, write_state
from regrow.tasks.train.optimizers import MuonAdamW, build_divided, transformers_arguments
from regrow.tasks.train.spec import LearningRateGroup, TrainSpec
from regrow.tasks.train.state import Staging, TorchEngine, _like
from regrow.tasks.train.worker import train


def spec(**changes):
    return TrainSpec("0" * 64, "float32", 4, 1, 1e-3, **{"weight_decay": 0.1} | changes)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(8, 4)
        self.layer = nn.Linear(4, 6)
        self.lm_head = nn.Linear(6, 8, bias=False)

    def forward(self, ids):
        return self.lm_head(self.layer(self.embed_tokens(ids)).tanh())

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head


DECAYED = {"embed_tokens.weight", "layer.weight", "lm_head.weight"}


def rates(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_groups_and_embeddings_learn_at_their_own_rates():
    model = Model()
    groups = (LearningRateGroup(("layer.w",), 1e-2),)
    chosen = spec(lr_groups=groups, embedding_lr=1e-5)
    found = rates(model, build_divided(model, chosen, DECAYED, torch.optim.AdamW, {"lr": 1e-3}))
    assert found == {
        "embed_tokens.weight": (1e-5, 0.1),
        "lm_head.weight": (1e-5, 0.1),
        "layer.weight": (1e-2, 0.1),
        "layer.bias": (1e-3, 0.0),
    }


def test_a_group_that_names_nothing_is_a_fault():
    chosen = spec(lr_groups=(LearningRateGroup(("q_proj",), 1e-2),))
    with pytest.raises(StageError, match="lr_groups: no trained parameter's name holds any of q_p"):
        build_divided(Model(), chosen, DECAYED, torch.optim.AdamW, {"lr": 1e-3})


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    loss = model(torch.randint(0, 8, (5,))).logsumexp(-1).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_muon_takes_the_matrices_inside_and_adamw_the_rest():
    model = Model()
    optimizer = build_divided(model, spec(optimizer="muon"), DECAYED, torch.optim.AdamW, {})
    assert isinstance(optimizer, MuonAdamW)
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer, 1)
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())
    kinds = {n: set(optimizer.state[p]) for n, p in model.named_parameters()}
    assert kinds["layer.weight"] == {"momentum_buffer"}
    assert all("exp_avg" in kinds[name] for name in kinds if name != "layer.weight")


def test_muons_state_survives_saving_and_its_rate_is_the_schedules():
    straight, stopped = Model(), Model()
    one, two = (
        build_divided(m, spec(optimizer="muon"), DECAYED, torch.optim.AdamW, {})
        for m in (straight, stopped)
    )
    for seed in range(6):
        step(straight, one, seed)
    for seed in range(3):
        step(stopped, two, seed)
    saved = copy.deepcopy((stopped.state_dict(), two.state_dict()))
    resumed = Model()
    resumed.load_state_dict(saved[0])
    three = build_divided(resumed, spec(optimizer="muon"), DECAYED, torch.optim.AdamW, {})
    three.load_state_dict(saved[1])
    for seed in range(3, 6):
        step(resumed, three, seed)
    assert all(torch.equal(straight.state_dict()[n], p) for n, p in resumed.state_dict().items())
    for group in three.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    before = copy.deepcopy(resumed.state_dict())
    step(resumed, three, 7)
    assert all(torch.equal(before[n], p) for n, p in resumed.state_dict().items())


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "adamw_torch_4bit", "galore_adamw"])
def test_a_missing_package_is_named_before_a_model_is_loaded(make_job, monkeypatch, name):
    install, module = PACKAGES[name]
    found = quantization.importlib.util.find_spec
    monkeypatch.setattr(
        quantization.importlib.util,
        "find_spec",
        lambda wanted: None if wanted == module.partition(".")[0] else found(wanted),
    )
    job = make_job("a", {"optimizer": name, "adapter": None})
    with pytest.raises(StageError, match=f"optimizer: {name}: .* pip install {install}"):
        train(job)


def test_arguments_reach_transformers_and_our_own():
    given = {"rank": 64, "scale": "0.25"}
    galore = spec(optimizer="galore_adamw", optimizer_args=given, optimizer_targets=("attn",))
    assert transformers_arguments(galore) == {
        "optim": "galore_adamw",
        "optim_args": "rank=64,scale=0.25",
        "optim_target_modules": ["attn"],
    }
    assert transformers_arguments(spec(adam_beta3=0.99))["optim_args"] == "beta3=0.99"
    assert transformers_arguments(spec(optimizer="ao_adamw_4bit"))["optim"] == "adamw_torch_4bit"
    assert optimizers.own_optimizer(spec(optimizer="adamw_torch")) is None


@pytest.mark.parametrize("ratio", [None, 8.0], ids=["plain", "loraplus"])
def test_no_group_of_parameters_is_empty(make_job, ratio):
    """DeepSpeed drops empty ones; a checkpoint must fit the optimizers and schedules of both."""
    groups, curves = [], []

    class Look(TrainerCallback):
        def on_train_begin(self, *args, optimizer, lr_scheduler, **kwargs):
            groups.extend(len(group["params"]) for group in optimizer.param_groups)
            curves.extend(lr_scheduler.state_dict()["lr_lambdas"])

    train(make_job("a", {"loraplus_lr_ratio": ratio, "max_steps": 1}), [Look()])
    assert groups
    assert all(groups)
    assert len(curves) == len(groups)


def test_frozen_rows_do_not_move(make_job):
    """Nor does weight decay draw them to zero."""
    rows = ("model.embed_tokens.weight[10:40]", r".*norm")
    unfrozen = {"unfrozen": rows, "adapter": None, "weight_decay": 0.5, "learning_rate": 1e-2}
    job = make_job("a", unfrozen)
    train(job)
    after = load_file(job.out / "model.safetensors")
    before = load_file(job.base_model / "model.safetensors")
    ends = "model.embed_tokens.weight"
    assert torch.equal(after[ends][:10], before[ends][:10])
    assert torch.equal(after[ends][40:], before[ends][40:])
    assert not torch.equal(after[ends][10:40], before[ends][10:40])
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved == {ends, *(name for name in before if "norm" in name)}


def test_averages_of_a_schedule_free_optimizer_leave_no_trace():
    pytest.importorskip("schedulefree")
    from schedulefree import AdamWScheduleFree

    from regrow.tasks.train.trainers.optimization import averaged_weights

    model = Model()
    optimizer = AdamWScheduleFree(model.parameters(), lr=1e-2)
    optimizer.train()
    for seed in range(3):
        step(model, optimizer, seed)
    before = copy.deepcopy(model.state_dict())
    with averaged_weights(optimizer):
        assert not torch.equal(before["layer.weight"], model.layer.weight)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


PAGED = ["PagedAdamW8bit", "PagedAdamW32bit", "PagedAdEMAMix", "PagedLion8bit"]


def paged(name, model, on_gpu):
    """bitsandbytes' optimizer; without a GPU, one that calls plain memory paged."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    cls = getattr(bitsandbytes.optim, name)

    class Paged(cls):
        def get_state_buffer(self, p, dtype=torch.float32):
            made = torch.zeros(p.shape, dtype=dtype)
            made.is_paged = p.numel() >= 1e5
            return made

        def _get_state_double_buffer(self, p, dtype=torch.float32):
            return self.get_state_buffer(p.expand(2, *p.shape), dtype)

        def prefetch_state(self, p):
            pass

    return (cls if on_gpu else Paged)(model.parameters(), lr=1e-2)


def steps_of_paged(name, directory, device):
    """The weights of six steps, of three and three more after a resume, and what was paged."""
    found, held = [], []
    for first in (0, 3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 20)).to(device)
        optimizer = paged(name, model, device == "cuda")
        engine = TorchEngine(model, optimizer)
        if first:
            engine.restore(SavedState(directory, None))
        for step in range(first, 6):
            random = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=random).to(device)
            optimizer.step()
            if step == 2:
                write_state(Staging().copy(engine.capture()), directory, {}, 0, None)
        found.append([p.detach().cpu() for p in model.parameters()])
        held.append(
            {
                (number, field): (getattr(value, "is_paged", False), value.device.type)
                for number, parameter in enumerate(model.parameters())
                for field, value in optimizer.state[parameter].items()
                if isinstance(value, torch.Tensor)
            }
        )
    return found, held


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", PAGED)
def test_paged_states_come_back_paged(name, device, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    (straight, resumed), (before, after) = steps_of_paged(name, tmp_path / "saved", device)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(resumed, straight, strict=True))
    assert after == before
    assert after[0, "state1"][0]
    assert not after[2, "state1"][0]  # a small one is not


def test_paged_states_of_a_shard_are_read_into_the_hosts_memory(tmp_path):
    """All of them at once: the GPU (here: the device "meta") may not hold them."""
    meeting = (tmp_path / "meeting").as_uri()
    torch.distributed.init_process_group("gloo", meeting, rank=0, world_size=1)
    try:
        local = torch.empty(300, 400, device="meta")
        parameter = DTensor.from_local(local, init_device_mesh("cpu", (1,)), [Shard(0)])
        for shape in ((300, 400), (2, 300, 400)):  # AdEMAMix has two rows of the first
            found = [_like("state1", parameter, shape, torch.uint8, on) for on in (True, False)]
            devices = [part.to_local().device.type for part in found]
            assert (devices, found[0].shape) == (["cpu", "meta"], shape)
    finally:
        torch.distributed.destroy_process_group()


def test_galore_in_8_bits_takes_galores_steps_on_a_cpu():
    """The states of so small a matrix stay in 32 bits, so that the steps are comparable."""
    galore_torch = pytest.importorskip("galore_torch")
    pytest.importorskip("bitsandbytes")
    from regrow.tasks.train.galore import GaLoreAdamW8bit

    torch.manual_seed(0)
    start, gradients = torch.randn(32, 48), torch.randn(6, 32, 48)
    low_rank = {"rank": 4, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    found = []
    for kind in (galore_torch.GaLoreAdamW, GaLoreAdamW8bit):
        plain, projected = (torch.nn.Parameter(start.clone()) for _ in range(2))
        groups = [{"params": [plain]}, {"params": [projected], **low_rank}]
        optimizer = kind(groups, lr=1e-2, weight_decay=0.1, eps=1e-8)
        for gradient in gradients:
            plain.grad, projected.grad = gradient.clone(), gradient.clone()
            optimizer.step()
            optimizer.zero_grad()
        assert not torch.equal(plain, projected)
        found.append((plain.detach(), projected.detach()))
    (plain, projected), (same_plain, same_projected) = found
    torch.testing.assert_close(same_projected, projected, atol=5e-6, rtol=0)
    # bitsandbytes decays before the step: apart by a thousandth of the 6 steps of 1e-2.
    torch.testing.assert_close(same_plain, plain, atol=1e-4, rtol=0)
