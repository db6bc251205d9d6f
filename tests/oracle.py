"""PyTorch in float64 as the judge, with the error that rounding explains.

A result may differ from the judge's by `FACTOR` eps times the same computation on absolute
values: that is what the rounding of the sums can amount to, element by element. It holds for
gradients as well, which are convolutions themselves.
"""
import mlx.core as mx
import numpy as np
import torch

FACTOR = 64
EPS = {mx.float32: 2**-23, mx.float16: 2**-10, mx.bfloat16: 2**-7, mx.float64: 2**-52,
       mx.complex64: 2**-23}
COMPLEX = (mx.complex64,)


def to_torch(a):
    "An MLX array as a PyTorch tensor of the widest type that holds it exactly."
    a = mx.stop_gradient(a)
    if a.dtype in COMPLEX: return torch.from_numpy(np.array(a)).to(torch.complex128)
    if mx.issubdtype(a.dtype, mx.floating):
        with mx.stream(mx.cpu): return torch.from_numpy(np.array(a.astype(mx.float64)))
    return torch.from_numpy(np.array(a))


def magnitude(t): return None if t is None else t.abs().to(torch.float64)


def forward_and_gradients(f, arrays, cotangent):
    "`f(*arrays)` and its gradients against `cotangent`, by PyTorch."
    leaves = [None if a is None else a.detach().clone().requires_grad_() for a in arrays]
    y = f(*leaves)
    y.backward(cotangent)
    return [y.detach()] + [a.grad for a in leaves if a is not None]


def assert_within_rounding(ours, judged, bounds, dtype, what=""):
    "Each element of `ours` within `FACTOR` eps of the judge, in units of its bound."
    assert tuple(ours.shape) == tuple(judged.shape), (
        f"{what}: shape {tuple(ours.shape)}, PyTorch has {tuple(judged.shape)}")
    assert ours.dtype == dtype, f"{what}: dtype {ours.dtype}, expected {dtype}"
    if not ours.size: return
    error = (to_torch(ours) - judged).abs()
    allowed = FACTOR * EPS[dtype] * bounds + {mx.float16: 2**-24}.get(dtype, 1e-37)
    worst = (error / allowed).max().item()
    assert not np.isnan(worst) and worst <= 1, f"{what}: error is {worst:.3g} times what is allowed"


def check(ours, theirs, arrays, what="", cotangent=None):
    """Compare `ours(*arrays)` and all its gradients with `theirs` on PyTorch tensors.

    `arrays` are MLX arrays or None (a missing bias). Returns nothing; asserts.
    """
    given = [a for a in arrays if a is not None]
    dtype = given[0].dtype
    def full(f): return lambda *present: f(*(next(it) if a is not None else None for it in [iter(present)] for a in arrays))
    y = ours(*arrays)
    rng = np.random.default_rng(y.size)
    if cotangent is None:
        c = rng.standard_normal(y.shape)
        if dtype in COMPLEX: c = c + 1j * rng.standard_normal(y.shape)
        cotangent = mx.array(c.astype(np.complex64 if dtype in COMPLEX else np.float32)).astype(dtype)

    def listed(*present):
        it = iter(present)
        return [ours(*(None if a is None else next(it) for a in arrays))]

    _, gradients = mx.vjp(listed, given, [cotangent])
    tensors = [None if a is None else to_torch(a) for a in arrays]
    judged = forward_and_gradients(theirs, tensors, to_torch(cotangent))
    bounds = forward_and_gradients(theirs, [magnitude(t) for t in tensors],
                                   magnitude(to_torch(cotangent)))
    names = ["output"] + [f"gradient {i}" for i in range(len(gradients))]
    for name, mine, right, bound in zip(names, [y, *gradients], judged, bounds):
        assert_within_rounding(mine, right, bound, dtype, f"{what} {name}".strip())
