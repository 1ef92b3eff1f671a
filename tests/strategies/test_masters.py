"""The update of DDP and FSDP2: AdamW, Muon and clipping as torch does them, and never a wait for the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.optim import UpdateRule, orthogonal
from pipeline.strategies.masters import Masters
from pipeline.strategies.precision import LossScale

SHAPES = [(4, 3), (5,), (2, 3, 3, 3), (0, 7)]  # the last: what FSDP2 leaves to a rank of many
RULE = UpdateRule(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, clip_norm=1.0)
MUON = replace(RULE, muon_momentum=0.9)


class NoWaiting(TorchDispatchMode):
    """An error where a tensor's value is read by Python."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def draws(step: int, size: float) -> list[Tensor]:
    draw = torch.Generator().manual_seed(step)
    return [size * torch.randn(shape, generator=draw) for shape in SHAPES]


def everything(of: Masters) -> list[Tensor]:
    return [*of.weights, *(tensor for tensors in of.moments().values() for tensor in tensors)]


def masters(*, hidden: tuple[int, ...] = ()) -> Masters:
    """`hidden`: places of what Muon updates."""
    return Masters(draws(100, 1.0), [len(shape) for shape in SHAPES], MUON if hidden else RULE, hidden=hidden)


@pytest.mark.parametrize("size", [1e-3, 1.0], ids=["unclipped", "clipped"])
def test_it_is_torchs_adamw_after_torchs_clipping(size: float) -> None:
    ours = masters()
    theirs = [weight.clone().requires_grad_() for weight in ours.weights]
    groups = [{"params": theirs[0::2] + theirs[3:]}, {"params": theirs[1:2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=RULE.betas, eps=RULE.eps, weight_decay=RULE.weight_decay)
    for step in range(5):
        for weight, gradient in zip(theirs, draws(step, size), strict=True):
            weight.grad = gradient
        wanted = torch.nn.utils.clip_grad_norm_(theirs, RULE.clip_norm)
        adamw.step()
        report = ours.step(draws(step, size), 1e-2, None)
        torch.testing.assert_close(report.grad_norm, wanted)
    for a, b in zip(ours.weights, theirs, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-6)
    assert ours.num_updates() == 5


def test_hidden_matrices_are_updated_as_torchs_muon_does_it() -> None:
    """torch's computes in bf16, which changes a matrix by one part in a hundred; all else is AdamW's, as before."""
    ours, adamw = masters(hidden=(0, 2)), masters()
    theirs = [weight.flatten(1).clone().requires_grad_() for weight in (ours.weights[0], ours.weights[2])]
    muon = torch.optim.Muon(
        theirs, lr=1e-2, momentum=0.9, weight_decay=RULE.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(5):
        given = draws(step, 1e-3)
        for weight, gradient in zip(theirs, (given[0], given[2]), strict=True):
            weight.grad = gradient.flatten(1)
        muon.step()
        ours.step(given, 1e-2, None)
        adamw.step(given, 1e-2, None)
    start = draws(100, 1.0)
    for place, other in zip((0, 2), theirs, strict=True):
        moved, wanted = (now.detach().flatten(1) - start[place].flatten(1) for now in (ours.weights[place], other))
        assert float((moved - wanted).norm() / wanted.norm()) < 0.02
        assert not torch.allclose(ours.weights[place], adamw.weights[place], atol=1e-3)
        assert not ours.moments()["exp_avg_sq"][place].any()
    assert torch.equal(ours.weights[1], adamw.weights[1])


def test_muons_update_is_orthogonal() -> None:
    """On both sides of a square, and of any size of gradient; alone or with others of its shape."""
    draw = torch.Generator().manual_seed(0)
    for shape in ((24, 96), (96, 24), (32, 32)):
        matrices = torch.randn(3, *shape, generator=draw) * torch.tensor([1e-6, 1.0, 1e6]).reshape(3, 1, 1)
        turned = orthogonal(matrices)
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        inside = u.mT @ turned @ v.mT  # diagonal, about 1
        assert float((inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))).abs().max()) < 1e-3
        if shape != (32, 32):  # whose smallest singular value may be near 0
            assert float(inside.diagonal(dim1=1, dim2=2).min()) > 0.6, shape
        assert float(inside.diagonal(dim1=1, dim2=2).max()) < 1.25
        torch.testing.assert_close(orthogonal(matrices[1:2])[0], turned[1], rtol=1e-4, atol=1e-5)


def test_scaled_gradients_make_the_same_update() -> None:
    plain, scaled, scale = masters(hidden=(2,)), masters(hidden=(2,)), LossScale(torch.device("cpu"))
    for step in range(3):
        plain.step(draws(step, 1.0), 1e-2, None)
        report = scaled.step([gradient * scale.scale for gradient in draws(step, 1.0)], 1e-2, scale)
        assert report.finite and not report.skipped
    for a, b in zip(scaled.weights, plain.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("hidden", [(), (0, 2)], ids=["adamw", "muon"])
@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_one_value_that_is_not_finite_changes_nothing_and_nobody_waits(
    value: float, fp16: bool, hidden: tuple[int, ...]
) -> None:
    ours, scale = masters(hidden=hidden), LossScale(torch.device("cpu")) if fp16 else None
    ours.step(draws(0, 1.0), 1e-2, scale)
    before = [tensor.clone() for tensor in everything(ours)]
    bad = draws(1, 1.0)
    bad[2][1, 2, 0, 1] = value
    with pytest.raises(AssertionError), NoWaiting():
        float(bad[0].sum())
    with NoWaiting():
        report = ours.step(bad, 1e-2, scale)
    assert all(torch.equal(a, b) for a, b in zip(everything(ours), before, strict=True))
    assert (bool(report.finite), bool(report.skipped)) == (fp16, fp16)
    assert ours.num_updates() == 1
    ours.step(draws(1, 1.0), 1e-2, scale)
    assert ours.num_updates() == 2


def test_what_has_no_gradient_has_a_zero_one() -> None:
    ours, zeros = masters(), masters()
    gradients: list[Tensor | None] = [*draws(0, 1.0)]
    gradients[0] = None
    ours.step(gradients, 1e-2, None)
    zeros.step([torch.zeros(SHAPES[0]), *draws(0, 1.0)[1:]], 1e-2, None)
    assert all(torch.equal(a, b) for a, b in zip(ours.weights, zeros.weights, strict=True))
