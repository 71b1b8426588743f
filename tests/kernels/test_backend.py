"""The choice between Triton and PyTorch: by the tensors, said once, and Triton may be missing."""

import logging
import subprocess
import sys

import torch

from regrow.kernels import backend


def test_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger=backend.logger.name):
        for _ in range(3):
            backend.uses_triton("an op of this test", torch.zeros(1))
    assert len([r for r in caplog.records if "an op of this test" in r.message]) == 1


def test_float64_goes_to_the_reference():
    assert not backend.uses_triton("some op", torch.zeros(1, dtype=torch.float64))


def test_all_ops_load_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch\n"
        "from regrow.kernels import linear_cross_entropy, lora_mlp, rms_norm, rope\n"
        "x = torch.ones(2, 4, requires_grad=True)\n"
        "rms_norm.rms_norm(x, torch.ones(4), 1e-5).sum().backward()\n"
        "assert x.grad is not None"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_blocks_are_powers_of_two():
    assert [backend.next_power_of_2(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
