"""float16 and bfloat16: sums in float32, and a bias added before the only rounding."""
import mlx.core as mx
import numpy as np
import oracle
import pytest
import torch

import flashconv.functional as F
from flashconv import kernels

CASES = {"conv1d": (2048, 3), "conv2d": (256, 3), "conv3d": (64, 3), "conv_transpose1d": (1024, 4),
         "conv_transpose2d": (128, 4), "conv_transpose3d": (32, 3)}


@pytest.mark.parametrize("with_kernels", (True, False), ids=("kernels", "operations"))
@pytest.mark.parametrize("dtype", (mx.float16, mx.bfloat16), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_no_further_off_than_pytorch(name, dtype, with_kernels, request):
    "Long sums, and a bias that a rounded sum would lose; the judge is float64."
    if not with_kernels: request.getfixturevalue("without_kernels")
    elif not kernels.available(): pytest.skip("there are no kernels here")
    (channels, k), n, rng = CASES[name], int(name[-2]), np.random.default_rng(0)
    x, w = (oracle.draw(rng, shape, dtype) for shape in ((1, channels, *[5] * n), (
        (channels, 8) if "transpose" in name else (8, channels)) + (k,) * n))
    b = oracle.draw(rng, (8,), dtype) / 64
    given = [oracle.to_torch(a) for a in (x, w, b)]
    exact = getattr(torch.nn.functional, name)(*given)
    theirs = getattr(torch.nn.functional, name)(*(
        t.to(getattr(torch, str(dtype).rpartition(".")[2])) for t in given)).double()
    ours = getattr(F, name)(x, w, b)
    assert ours.dtype == dtype and ours.shape == tuple(exact.shape)
    # One rounding of the result, and what float32 loses in the sum.
    sums = getattr(torch.nn.functional, name)(*(t.abs() for t in given))
    once = oracle.EPS[dtype] / 2 * exact.abs() + 8 * 2**-23 * sums
    error, judged = (oracle.to_torch(ours) - exact).abs(), (theirs - exact).abs()
    assert (error <= torch.maximum(once, judged)).all()
    assert error.mean() <= 1.01 * judged.mean() + once.mean() * 0.01
