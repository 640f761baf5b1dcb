"""A fused kernel is tried before it is used: its outputs and gradients against arithmetic."""

from dataclasses import replace

import pytest
import torch

from mutor.mtp import kernels

CPU = kernels.KERNELS["cpu"]


def forward_with(change):
    """The CPU's kernel, its outputs changed."""
    return lambda *given: change(*CPU.forward(*given))


def backward_with(change):
    """The CPU's kernel, its gradients changed."""
    return lambda *given: change(*CPU.backward(*given))


def test_a_kernel_may_be_off_by_rounding(monkeypatch):
    """Which is 1% in bfloat16, and not in float32."""
    off = backward_with(lambda q, k, v: (q * 1.01, k, v))
    monkeypatch.setitem(kernels.KERNELS, "cpu", replace(CPU, backward=off))
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        kernels.kernel_for.cache_clear()
        found[dtype] = kernels.kernel_for(torch.device("cpu"), dtype, 32) is None
    kernels.kernel_for.cache_clear()
    assert found == {torch.float32: True, torch.bfloat16: False, torch.float16: False}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, ""),
        ({"forward": forward_with(lambda out, lse, state: (out * 1.2, lse, state))}, "gradients are wrong"),
        ({"forward": forward_with(lambda out, lse, state: (out, lse + 0.3, state))}, "gradients are wrong"),
        ({"backward": backward_with(lambda q, k, v: (q * 1.2, k, v))}, "gradients are wrong"),
        ({"backward": backward_with(lambda q, k, v: (q, k + 0.3, v))}, "gradients are wrong"),
        ({"backward": backward_with(lambda q, k, v: (q, k, v.roll(1, 2)))}, "gradients are wrong"),
        ({"forward": lambda *given: 1 // 0}, None),
        ({"forward": lambda *given: len(None)}, "object of type 'NoneType' has no len()"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_is_tried_before_it_is_used(monkeypatch, caplog, wrong, said, dtype):
    """Each output and gradient against arithmetic, in a warning that names device, type and width; once a width."""
    monkeypatch.setitem(kernels.KERNELS, "cpu", replace(CPU, **wrong))
    where, times = torch.device("cpu"), []
    monkeypatch.setattr(kernels, "_right", lambda *given, right=kernels._right: times.append(1) or right(*given))
    kernels.kernel_for.cache_clear()
    try:
        if said is None:  # what no kernel says of itself is a bug
            with pytest.raises(ZeroDivisionError):
                kernels.kernel_for(where, dtype, 32)
            return
        found = [kernels.kernel_for(where, dtype, 32) for _ in range(2)]
        assert kernels.kernel_for(torch.device("meta"), dtype, 32) is None  # there is none for it
    finally:
        kernels.kernel_for.cache_clear()
    assert found == [None if said else CPU] * 2 and len(times) == 1
    begin = f"attention: no fused kernel on cpu for {dtype}, heads of 32 ("
    assert [r.getMessage().startswith(begin) and said in r.getMessage() for r in caplog.records] == [True] * bool(said)
