"""`unfold` and `fold` against PyTorch's in 2d, against loops in 1d and 3d, as transposes everywhere."""
from itertools import product

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as T

import flashconv as fc
import flashconv.functional as F

CASES = [dict(kernel_size=k, dilation=d, padding=p, stride=s)
         for k, d, p, s in product((1, 2, (3, 2)), (1, (1, 2)), (0, (2, 1)), (1, 2, (3, 1)))]


def loop(x, kernel, d, p, s):
    "(N, C * values, windows) by NumPy, for any number of axes."
    n = len(kernel)
    x = np.pad(x, [(0, 0), (0, 0)] + [(p, p)] * n)
    places = [(size - d * (k - 1) - 1) // s + 1 for size, k in zip(x.shape[2:], kernel)]
    y = np.zeros((*x.shape[:2], *kernel, *places), x.dtype)
    for at in np.ndindex(*kernel, *places):
        y[(..., *at)] = x[(..., *(t * d + i * s for t, i in zip(at[:n], at[n:])))]
    return y.reshape(len(x), x.shape[1] * np.prod(kernel), -1)


def test_against_pytorch():
    "Both functions with gradients, batched and not, both formats."
    x = oracle.draw(np.random.default_rng(0), (2, 3, 7, 8))
    for kw in CASES:
        oracle.check(lambda x: F.unfold(x, **kw), lambda x: T.unfold(x, **kw), [x], str(kw))
        columns = F.unfold(x, **kw)
        oracle.check(lambda y: F.fold(y, (7, 8), **kw), lambda y: T.fold(y, (7, 8), **kw), [columns], str(kw))
        assert mx.array_equal(F.unfold(x[0], **kw), columns[0]).item()
        last = F.unfold(mx.moveaxis(x, 1, -1), **kw, data_format="channels_last")
        assert mx.array_equal(last.swapaxes(1, 2), columns).item()
        back = F.fold(last, (7, 8), **kw, data_format="channels_last")
        assert mx.array_equal(mx.moveaxis(back, -1, 1), F.fold(columns, (7, 8), **kw)).item()


@pytest.mark.parametrize("kernel", ((3,), (2,), (2, 3, 1), (3, 1, 2)))
def test_one_and_three_axes(kernel):
    "The loop, and the transpose of it."
    n = len(kernel)
    x = mx.random.normal((2, 3, *(7, 6, 8)[:n]))
    for d, p, s in product((1, 2), (0, 1), (1, 2)):
        kw = dict(kernel_size=kernel, dilation=d, padding=p, stride=s)
        y = F.unfold(x, **kw)
        expected = loop(np.array(x), kernel, d, p, s)
        assert y.shape == expected.shape and np.array_equal(np.array(y), expected)
        c = mx.random.normal(y.shape)
        assert np.isclose((y * c).sum().item(), (x * F.fold(c, x.shape[2:], **kw)).sum().item(), atol=1e-3)


@pytest.mark.parametrize("dtype", (mx.float16, mx.bfloat16, mx.complex64, mx.int32), ids=str)
def test_dtypes(dtype):
    x = oracle.draw(np.random.default_rng(0), (1, 2, 5, 5), dtype)
    y = F.unfold(x, 2)
    assert y.dtype == dtype and F.fold(y, 5, 2).dtype == dtype
    assert mx.array_equal(y[0, 0], x[0, 0, :4, :4].flatten()).item()


def test_transforms():
    "vmap, compile, second derivatives, empty batches."
    x = mx.random.normal((4, 2, 3, 6, 6))
    def both(x): return F.fold(mx.square(F.unfold(x, 3, stride=2)), 6, 3, stride=2)
    assert mx.allclose(mx.vmap(both)(x), mx.stack([both(a) for a in x]), atol=1e-5).item()
    assert mx.allclose(mx.compile(both)(x[0]), both(x[0]), atol=1e-5).item()
    def penalty(x): return mx.square(mx.grad(lambda x: mx.square(both(x)).sum())(x)).sum()
    def judged(x):
        f = T.fold(T.unfold(x, 3, stride=2).square(), 6, 3, stride=2).square().sum()
        return torch.autograd.grad(f, x, create_graph=True)[0].square().sum()
    t = oracle.to_torch(x[0]).requires_grad_()
    judged(t).backward()
    assert np.allclose(np.array(mx.grad(penalty)(x[0])), t.grad.numpy(), rtol=1e-3, atol=1e-1)
    assert F.unfold(x[0, :0], 3).shape == (0, 27, 16) and F.fold(F.unfold(x[0, :0], 3), 6, 3).shape == (0, 3, 6, 6)


def test_layers():
    theirs = torch.nn.Sequential(torch.nn.Unfold(3, padding=1), torch.nn.Fold((6, 5), 3, padding=1))
    x = torch.randn(2, 3, 6, 5)
    ours = fc.convert_model(theirs)
    assert [type(layer) for layer in ours.layers] == [fc.Unfold, fc.Fold]
    assert np.allclose(np.array(ours(mx.array(x.numpy()))), theirs(x).numpy(), atol=1e-5)
    for mine, judge in zip(ours.layers, theirs): assert repr(mine) == repr(judge)
    last = fc.convert_model(theirs, data_format="channels_last")
    y = mx.moveaxis(last(mx.array(x.numpy()).transpose(0, 2, 3, 1)), -1, 1)
    assert np.allclose(np.array(y), theirs(x).numpy(), atol=1e-5)
    assert isinstance(fc.Unfold((3,)), nn.Module) and fc.Unfold((3,))(mx.ones((2, 3, 8))).shape == (2, 9, 6)


REFUSED = [
    ("unfold", (1, 2, 5, 6), (7,), {}), ("unfold", (1, 2, 5, 6), (0,), {}), ("unfold", (1, 2, 5, 6), (2,), {"stride": 0}),
    ("unfold", (1, 2, 5, 6), (2,), {"padding": -1}), ("unfold", (1, 2, 5, 6), (2,), {"dilation": 0}),
    ("unfold", (1, 0, 5, 6), (2,), {}), ("unfold", (1, 2, 0, 6), (2,), {}), ("unfold", (1, 2, 5, 6), (2,), {"padding": (1,)}),
    ("unfold", (1, 2, 5, 6), (2.0,), {}), ("unfold", (1, 1, 2, 5, 6), (2,), {}),
    ("fold", (2, 12, 20), ((5, 6), 3), {}), ("fold", (2, 12, 20), ((5, 5), 2), {}), ("fold", (20,), ((5, 6), 2), {}),
    ("fold", (2, 12, 20), ((5, 6, 7), 2), {}), ("fold", (2, 12, 20), ((5, 6), 2), {"stride": 0}),
    ("fold", (2, 12, 20), ((0, 6), 2), {}), ("fold", (2, 12, 20), ((5, 6), 2), {"padding": -1}),
]


@pytest.mark.parametrize("name, shape, args, kw", REFUSED, ids=str)
def test_refused(name, shape, args, kw):
    "PyTorch's type, and the beginning of its words."
    with pytest.raises(Exception) as theirs: getattr(T, name)(torch.zeros(shape), *args, **kw)
    with pytest.raises(theirs.type) as ours: getattr(F, name)(mx.zeros(shape), *args, **kw)
    if theirs.type is RuntimeError: assert str(ours.value)[:24] == str(theirs.value)[:24]


def test_no_array():
    for call in (lambda: F.unfold([1.0], 2), lambda: F.fold(None, 3, 2), lambda: F.unfold(mx.ones((1, 1, 4, 4)), "2")):
        with pytest.raises(TypeError): call()
    with pytest.raises(RuntimeError, match="1 to 3 entries"): F.unfold(mx.ones((1, 1, 4, 4)), (1, 1, 1, 1))
    with pytest.raises(ValueError, match="data_format"): fc.Unfold(2, data_format="NHWC")
