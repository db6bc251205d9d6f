"""PyTorch in float64 as the judge, with the error that rounding explains.

A result may differ from the judge's by `FACTOR` eps times the same computation on absolute
values: that is what the rounding of the sums can amount to, element by element. It holds for
gradients as well, which are convolutions themselves. Integers have to be equal.
"""
from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch, the judge, is not installed")
torch.set_num_threads(1)  # tiny arrays, and a process per core

FACTOR = 64
EPS = {mx.float32: 2**-23, mx.float16: 2**-10, mx.bfloat16: 2**-7, mx.float64: 2**-52,
       mx.complex64: 2**-23}
TINY = {mx.float16: 2**-24}
INTEGERS = (mx.int8, mx.uint8, mx.int16, mx.int32, mx.int64)


def where(dtype):
    "The context for work in `dtype`: float64 exists on the CPU only."
    return mx.stream(mx.cpu) if dtype == mx.float64 else nullcontext()


def draw(rng, shape, dtype=mx.float32):
    "An array of `dtype`: normally distributed, or any integers."
    if dtype in INTEGERS:
        info = np.iinfo(str(dtype).rpartition(".")[2])
        return mx.array(rng.integers(info.min, info.max, shape, info.dtype, endpoint=True))
    a = rng.standard_normal(shape)
    if dtype == mx.complex64:
        return mx.array((a + 1j * rng.standard_normal(shape)).astype(np.complex64))
    with where(dtype): return mx.array(a.astype(np.float32)).astype(dtype)


def to_torch(a):
    "An MLX array as a contiguous PyTorch tensor of the widest type that holds it exactly."
    if a is None: return None
    a = mx.stop_gradient(a)
    if mx.issubdtype(a.dtype, mx.complexfloating):
        return torch.from_numpy(np.array(a, order="C")).to(torch.complex128)
    if mx.issubdtype(a.dtype, mx.floating):
        with mx.stream(mx.cpu): return torch.from_numpy(np.array(a.astype(mx.float64), order="C"))
    return torch.from_numpy(np.array(a, order="C"))


def to_mlx(t):
    "A PyTorch tensor as an MLX array of the same dtype."
    t = t.detach()
    if t.dtype == torch.bfloat16: return mx.array(t.float().numpy()).astype(mx.bfloat16)
    dtype = getattr(mx, str(t.dtype).rpartition(".")[2])
    with where(dtype): return mx.array(t.numpy(), dtype)


def _magnitude(t): return None if t is None else t.abs().to(torch.float64)


def _forward_and_gradients(f, tensors, cotangent):
    "`f(*tensors)` and its gradients against `cotangent`, by PyTorch."
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = f(*leaves)
    y.backward(cotangent)
    return [y.detach()] + [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                           for leaf in leaves if leaf is not None]


def assert_within(allowed, ours, judged, dtype, what):
    "Shape and dtype as expected, and no element further off than `allowed`."
    assert ours.shape == tuple(judged.shape), (
        f"{what}: shape {ours.shape}, PyTorch has {tuple(judged.shape)}")
    assert ours.dtype == dtype, f"{what}: dtype {ours.dtype}, expected {dtype}"
    if not ours.size: return
    worst = ((to_torch(ours) - judged).abs() / allowed).max().item()
    assert worst <= 1, f"{what}: the error is {worst:.3g} times what is allowed"


def assert_within_rounding(ours, judged, bound, dtype, what=""):
    "Each element of `ours` within `FACTOR` eps of the judge, in units of `bound`."
    allowed = FACTOR * EPS[dtype] * bound.abs() + TINY.get(dtype, 1e-37)
    assert_within(allowed, ours, judged, dtype, what)


def assert_within_norm(ours, judged, bound, dtype, what=""):
    "As above in units of the largest bound: transforms spread the rounding of a value over all."
    assert_within_rounding(ours, judged, bound.max() if bound.numel() else bound, dtype, what)


def assert_rounded_once(ours, judged, bound, dtype, what=""):
    "As above for half precision that was accumulated in float32: one rounding, at the end."
    allowed = EPS[dtype] * judged.abs() + FACTOR * 2**-23 * bound + TINY.get(dtype, 1e-37)
    assert_within(allowed, ours, judged, dtype, what)


def assert_no_drift(ours, judged, bound, dtype, what=""):
    "Within a thousandth of a long sum: PyTorch's float32 reaches 2e-5, a running total 1e-2."
    assert_within(1e-3 * bound, ours, judged, dtype, what)


def assert_equal(ours, theirs, what=""):
    "The same shape, dtype and elements as a PyTorch tensor."
    theirs = to_mlx(theirs)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), what
    with mx.stream(mx.cpu): assert mx.array_equal(ours, theirs, equal_nan=True), what


def check(ours, theirs, arrays, what="", assertion=assert_within_rounding, positive=False):
    """Compare `ours(*arrays)` and all its gradients with `theirs` on PyTorch tensors.

    `arrays` are MLX arrays of one dtype, or None (a missing bias). The cotangent is random, and
    of one sign if it shall be `positive`.
    """
    given = [a for a in arrays if a is not None]
    dtype = given[0].dtype

    def listed(*present):
        rest = iter(present)
        return [ours(*(None if a is None else next(rest) for a in arrays))]

    with where(dtype):
        y = ours(*arrays)
        cotangent = draw(np.random.default_rng(y.size), y.shape, dtype)
        if positive: cotangent = mx.abs(cotangent)
        _, gradients = mx.vjp(listed, given, [cotangent])
    tensors, toward = [to_torch(a) for a in arrays], to_torch(cotangent)
    judged = _forward_and_gradients(theirs, tensors, toward)
    bounds = _forward_and_gradients(theirs, map(_magnitude, tensors), _magnitude(toward))
    for i, results in enumerate(zip([y, *gradients], judged, bounds, strict=True)):
        assertion(*results, dtype, f"{what} {f'gradient {i - 1}' if i else 'output'}".strip())
