"""Attention by cuDNN: equal to the formula where it runs, and left alone where it cannot.

Without its package the plans are stood in for by PyTorch on the CPU, which sees what cuDNN would be
given: the places of examples, among them those without tokens.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from regrow.kernels import cudnn_attention as ours
from regrow.kernels import packed_attention as backends
from regrow.kernels.neighbours import Gap
from regrow.tasks.modeling.recompute import checkpoint_arguments
from tests.bench.step_workloads import documents, pack, workload
from tests.kernels.test_packed_attention import make, reference

LENGTHS = [1, 37, 5, 128, 2]
N, K, H = 4, 2, 64


class StandIn:
    """A plan that reads rows by the offsets cuDNN would get."""

    calls = 0

    def __init__(self, sizes):
        self.sizes = sizes

    def run(self, device, values):
        StandIn.calls += 1
        s, v = self.sizes, values
        lengths = v["lengths"].tolist()
        assert len(lengths) == s.examples
        assert max(lengths) <= s.longest
        assert [x // (s.heads * s.size) for x in v["at_q"].tolist()] == v["bounds"].tolist()
        assert [x // (s.key_heads * s.size) for x in v["at_k"].tolist()] == v["bounds"].tolist()
        assert [x // s.heads for x in v["at_stats"].tolist()] == v["bounds"].tolist()
        row = s.heads * s.size + s.room
        assert [x // row for x in v["at_out"].tolist()] == v["bounds"].tolist()
        assert v["out"].stride() == (row, s.size, 1)


class Forward(StandIn):
    def run(self, device, values):
        values["bounds"] = values["lengths"].new_zeros(self.sizes.examples + 1)
        values["bounds"][1:] = values["lengths"].cumsum(0)
        super().run(device, values)
        lengths = [n for n in values["lengths"].tolist() if n]
        values["out"].copy_(reference(*(values[n] for n in "qkv"), lengths, self.sizes.scale))
        values["stats"].fill_(7)


class Backward(StandIn):
    """By hand: below the dispatcher's operation there is no autograd."""

    def run(self, device, values):
        assert (values["stats"] == 7).all()
        start, groups = 0, self.sizes.heads // self.sizes.key_heads
        for length in values["lengths"].tolist():
            part, start = slice(start, start + length), start + length
            q, k, v, do = (
                values[name][part].double().transpose(0, 1) for name in ("q", "k", "v", "dout")
            )
            k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
            seen = torch.ones(length, length, dtype=torch.bool).tril()
            scores = (self.sizes.scale * q @ k.mT).masked_fill(~seen, -torch.inf)
            p = scores.softmax(-1)
            dp = do @ v.mT
            ds = self.sizes.scale * p * (dp - (dp * p).sum(-1, keepdim=True))
            of_group = (self.sizes.key_heads, groups, length, self.sizes.size)
            values["dq"][part] = (ds @ k).transpose(0, 1).float()
            values["dk"][part] = (ds.mT @ q).reshape(of_group).sum(1).transpose(0, 1).float()
            values["dv"][part] = (p.mT @ do).reshape(of_group).sum(1).transpose(0, 1).float()


def forget_plans(monkeypatch):
    monkeypatch.setattr(ours, "_planned", {})
    ours._sizes_of.cache_clear()
    ours._why_no_plan.cache_clear()


@pytest.fixture
def stood_in(monkeypatch):
    """Plans by PyTorch, and the word that cuDNN is to be asked; counts forward passes."""
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(cudnnGraphNotSupportedError=KeyError))
    monkeypatch.setattr(ours, "_forward_plan", Forward)
    monkeypatch.setattr(ours, "_backward_plan", Backward)
    monkeypatch.setattr(backends, "_backend", lambda *args: backends._cudnn)
    torch.use_deterministic_algorithms(False)
    forget_plans(monkeypatch)
    StandIn.calls = 0
    yield
    ours._why_no_plan.cache_clear()
    ours._sizes_of.cache_clear()


def check(q, k, v, cu, upstream, tolerance, behind=None):
    scale = H**-0.5
    mine, theirs = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    lengths = cu.diff().tolist()
    out = backends.packed_attention(*mine, cu, max(lengths), scale=scale, behind=behind)
    due = reference(*theirs, lengths, scale)
    out.backward(upstream)
    due.backward(upstream.double())
    torch.testing.assert_close(out.double(), due, atol=tolerance, rtol=tolerance)
    for x, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x.grad, right.grad, atol=4 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("lengths", [LENGTHS, [64], [7] * 33, [3] * 64], ids=str)
def test_rows_are_told_by_offsets(stood_in, lengths):
    check(*make(lengths, N, K, H), 1e-5)
    assert StandIn.calls == 1


def test_there_is_room_behind_the_result_where_asked(stood_in):
    q, k, v, cu, _ = given = make(LENGTHS, N, K, H)
    gap = Gap(16)
    check(*given, 1e-5, gap)
    out = backends.packed_attention(q, k, v, cu, max(LENGTHS), scale=1.0, behind=gap)
    assert out.stride() == (N * H + 16, H, 1)
    assert gap.behind([out.flatten(1)]).shape == (len(q), 16)


def test_room_that_was_lost_on_the_way_is_made_anew(stood_in):
    """Hooks that keep saved tensors elsewhere bring them back without gaps."""
    given = make(LENGTHS, N, K, H)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone().contiguous(), lambda x: x):
        check(*given, 1e-5, Gap(16))


def test_where_cudnn_has_no_plan_with_room_there_is_none(stood_in, monkeypatch):
    refuse(monkeypatch, lambda sizes: sizes.room > 0)
    gap = Gap(16)
    check(*make(LENGTHS, N, K, H), 1e-5, gap)
    assert StandIn.calls == 1
    q, k, v, cu, _ = make(LENGTHS, N, K, H)
    out = backends.packed_attention(q, k, v, cu, max(LENGTHS), scale=1.0, behind=gap)
    assert out.is_contiguous()
    assert gap.behind([out.flatten(1)]) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("room", [0, 64])
@pytest.mark.parametrize("lengths", [LENGTHS, [1500, 300, 64], [7] * 17], ids=str)
@pytest.mark.parametrize(("n", "kv", "h"), [(4, 2, 64), (8, 2, 128), (4, 4, 128)])
def test_equals_the_formula_on_the_gpu(lengths, n, kv, h, room):
    if ours.why_not(torch.bfloat16, h):
        pytest.skip(ours.why_not(torch.bfloat16, h))
    torch.use_deterministic_algorithms(False)
    q, k, v, cu, upstream = make(lengths, n, kv, h, torch.bfloat16, "cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    assert not ours.why_not_here(q, k, len(lengths), max(lengths), h**-0.5, room)
    out = ours.cudnn_attention(*leaves, cu, max(lengths), h**-0.5, room)
    assert out.stride(0) == n * h + room
    due = reference(*wide, lengths, h**-0.5)
    found = torch.autograd.grad(out, leaves, upstream)
    right = torch.autograd.grad(due, wide, upstream.double())
    for a, b in zip([out, *found], [due, *right], strict=True):
        assert (a.double() - b).norm() <= 2e-2 * b.norm()


def test_views_of_one_matrix_are_read_right(stood_in):
    q, k, v, cu, upstream = make(LENGTHS, N, K, H)
    both = torch.cat([k, v], 1)
    check(q, both[:, :K], both[:, K:], cu, upstream, 1e-5)


def test_a_checkpoint_keeps_the_result(stood_in):
    """`selective`: attention is not computed again."""
    q, k, v, cu, upstream = make(LENGTHS, N, K, H)
    leaf = q.requires_grad_()
    how = checkpoint_arguments("selective", use_reentrant=False)

    def layer(x):
        longest = max(LENGTHS)
        return backends.packed_attention(x * 2, k, v, cu, longest, scale=0.1).sin()

    checkpoint(layer, leaf, **how).backward(upstream)
    assert StandIn.calls == 1
    assert leaf.grad is not None


@pytest.mark.parametrize(
    "options", [{"sliding_window": 4}, {"causal": False}, {"cu_seqlens_k": True}], ids=str
)
def test_what_it_has_not_goes_to_the_backend_after_it(stood_in, monkeypatch, options):
    asked = []
    monkeypatch.setattr(backends, "_torch_varlen", lambda q, *args: asked.append(q) or q)
    q, k, v, cu, _ = make(LENGTHS, N, K, H)
    if "cu_seqlens_k" in options:
        options = {"cu_seqlens_k": cu.clone(), "max_seqlen_k": max(LENGTHS)}
    backends.packed_attention(q, k, v, cu, max(LENGTHS), scale=0.1, **options)
    assert len(asked) == 1
    assert StandIn.calls == 0


def test_a_row_without_a_plan_goes_there_too(stood_in, monkeypatch, caplog):
    def none(sizes):
        raise RuntimeError("no engine")

    asked = []
    monkeypatch.setattr(ours, "_backward_plan", none)
    monkeypatch.setattr(backends, "_torch_varlen", lambda q, *args: asked.append(q) or q)
    q, k, v, cu, _ = make(LENGTHS, N, K, H)
    for _ in range(2):
        backends.packed_attention(q, k, v, cu, max(LENGTHS), scale=0.1)
    assert len(asked) == 2
    assert caplog.text.count("no engine") == 1


def test_sums_in_a_fixed_order_are_not_cudnns(stood_in):
    q, k, _, _, _ = make(LENGTHS, N, K, H)
    assert not ours.why_not_here(q, k, 5, 128, 0.1)
    torch.use_deterministic_algorithms(True)
    assert ours.why_not_here(q, k, 5, 128, 0.1)


def refuse(monkeypatch, unwanted):
    """cuDNN has no plan for such sizes; the list it returns grows by each that it was asked for."""
    asked = []

    def backward(sizes):
        asked.append((sizes.examples, sizes.longest))
        if unwanted(sizes):
            raise RuntimeError("no engine")
        return Backward(sizes)

    monkeypatch.setattr(ours, "_backward_plan", backward)
    return asked


@pytest.mark.parametrize(
    ("rows", "due"),
    [
        ([(10, 9000), (10, 3000), (10, 4000)], [(128, 16384), (128, 4096)]),
        ([(10, 3000), (10, 9000), (300, 2000)], [(128, 4096), (128, 16384), (512, 4096)]),
        ([(10, 9000), (10, 9001), (10, 9000)], [(128, 16384)]),
    ],
    ids=["largest first", "largest second", "none fits"],
)
def test_sizes_that_are_refused_leave_smaller_ones_their_plans(stood_in, monkeypatch, rows, due):
    asked = refuse(monkeypatch, lambda sizes: sizes.longest > 4096)
    q = torch.empty(16384, N, H, device="meta")
    for examples, longest in rows:
        why = ours.why_not_here(q, q[:, :K], examples, longest, 0.1)
        assert bool(why) == (longest > 4096)
    assert asked == due


def test_a_plan_serves_all_that_fits_into_it(stood_in):
    q, k, _, _, _ = make([100], N, K, H)

    def plan(examples, longest):
        assert not ours.why_not_here(q, k, examples, longest, 0.1)
        found = ours._sizes(q, k, examples, longest, 0.1, 0)
        return found.examples, found.longest

    assert plan(3, 70) == plan(64, 1024) == (64, 1024)
    assert plan(65, 70) == (128, 1024)
    assert plan(2, 1025) == (128, 2048)  # as large as all before
    assert plan(5, 900) == (64, 1024)
    assert plan(70, 3000) == (128, 4096)
    q, k, _, _, _ = make([8192], N, K, H)
    assert plan(3, 70) == (64, 4096)
    q, k, _, _, _ = make([16384], N, K, H)
    assert plan(3, 70) == (128, 4096)


def test_a_training_makes_few_plans(stood_in):
    """On the bench's own documents, of more steps than it takes."""
    rows = workload_rows("W3:timed=60")
    sizes = []
    for lengths in rows:
        q = torch.empty(sum(lengths), 32, 64, device="meta", dtype=torch.bfloat16)
        assert not ours.why_not_here(q, q[:, :8], len(lengths), max(lengths), 0.125)
        sizes.append(ours._sizes(q, q[:, :8], len(lengths), max(lengths), 0.125, 0))
        assert sizes[-1].examples >= len(lengths)
        assert sizes[-1].longest >= max(lengths)
    assert len(set(sizes)) == 1


def workload_rows(text):
    w = workload(text, False)
    packed = pack(documents(int(1.3 * w.steps * w.rows * w.seq), w.seq, 1000), w.seq)
    lengths = [[len(ids) for ids, _ in row] for row in packed]
    starts = range(0, w.steps * w.rows, w.rows)
    return [[n for row in lengths[i : i + w.rows] for n in row] for i in starts]


def test_places_are_made_once_for_all_layers(stood_in, monkeypatch):
    made = []
    places = ours._places
    monkeypatch.setattr(ours, "_places", lambda *args: made.append(1) or places(*args))
    q, k, v, cu, _ = make(LENGTHS, N, K, H)
    for _ in range(3):
        backends.packed_attention(q, k, v, cu, max(LENGTHS), scale=0.1)
    assert len(made) == 1
    other = cu.clone()
    backends.packed_attention(q, k, v, other, max(LENGTHS), scale=0.1)
    assert len(made) == 2
    other += 0  # written to: made again
    backends.packed_attention(q, k, v, other, max(LENGTHS), scale=0.1)
    assert len(made) == 3


def test_a_package_that_does_not_load_is_a_reason(monkeypatch):
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: object())
    for module in (None, SimpleNamespace(), SimpleNamespace(backend_version=lambda: 90100)):
        monkeypatch.setitem(sys.modules, "cudnn", module)
        ours.why_not.cache_clear()
        assert ours.why_not(torch.bfloat16, 128)
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(backend_version=lambda: 91300))
    ours.why_not.cache_clear()
    assert not ours.why_not(torch.bfloat16, 128)
    assert ours.why_not(torch.float16, 128)
    assert ours.why_not(torch.bfloat16, 80)
    ours.why_not.cache_clear()
