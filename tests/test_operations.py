"""Each operation of the table against PyTorch's of the same name, with gradients."""
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import mlx.core as mx
from flashconv.convert.layers import _as_array
from flashconv.convert.network_operations import OPERATIONS
from flashconv.convert.operations import write

ATEN = torch.ops.aten


def t(*shape, seed=0, scale=1.0, dtype=torch.float64):
    "Random reals."
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * scale).to(dtype)


def whole(*shape, high=5, low=0, seed=0, dtype=torch.int64):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def positive(*shape): return t(*shape).abs() + 0.1


SPECIAL = torch.tensor([-math.inf, -7.5, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.5, 3.0, 6.0, 30.0, math.inf,
                        math.nan], dtype=torch.float64)
EDGES = torch.tensor([-7.0, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0, 25.0], dtype=torch.float64)
X, Y = t(3, 4), t(3, 4, seed=1)
N, M = whole(3, 4, high=9, low=-8), whole(3, 4, high=4, low=1, seed=1)
MASK = X > 0
IMAGE, VOLUME, LINE = t(2, 4, 7, 6), t(1, 2, 5, 4, 6), t(2, 4, 9)

# (name in the graph, overload, arguments, arguments by name)
CASES = []


def case(name, *args, **kwargs):
    "An operation, with its overload behind a dot, and the arguments of a call."
    CASES.append((name, args, kwargs))


for _name in """exp expm1 tanh sin cos sigmoid relu silu mish gelu relu6 hardswish hardsigmoid elu
        selu celu leaky_relu softplus hardtanh log_sigmoid hardshrink softshrink floor ceil round
        trunc frac neg abs sign isnan isinf isfinite square erf atan asinh sinh cosh exp2
        logical_not sinc angle""".split():
    case(_name, SPECIAL if _name not in ("sinh", "cosh", "sin", "cos", "frac", "sinc", "sign", "mish")
         else EDGES)
    case(_name, EDGES.clone().float())
for _name in "log log2 log10 log1p sqrt rsqrt reciprocal acosh".split(): case(_name, positive(3, 4) + 1)
for _name in "asin acos atanh erfinv".split(): case(_name, torch.tanh(X) * 0.9)
case("logit", torch.sigmoid(X))
case("logit", torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), 1e-3)
for _name in "add.Tensor sub.Tensor mul.Tensor div.Tensor atan2 maximum minimum fmax fmin".split():
    case(_name, X, Y)
    case(_name, X, Y[:1])
for _name in "add.Tensor mul.Tensor sub.Tensor div.Tensor".split():
    case(_name, X.float(), whole(3, 4))
    case(_name, N, whole(3, 4, high=4, low=1, dtype=torch.int32))
    case(_name, X.half(), t(3, 4, seed=2).bfloat16())
    case(_name, MASK.to(torch.uint8), N)
for _name in "add.Scalar mul.Scalar sub.Scalar div.Scalar rsub.Scalar".split():
    case(_name, X, 2)
    case(_name, N, 2.5)
    case(_name, X.half(), 2.5)
case("add.Tensor", X, Y, alpha=2.5)
case("sub.Tensor", X, Y, alpha=2)
for _mode in (None, "floor", "trunc"):
    case("div.Tensor_mode", X, Y, rounding_mode=_mode)
    case("div.Tensor_mode", N, M, rounding_mode=_mode)
    case("div.Scalar_mode", N, -3, rounding_mode=_mode)
for _name in "remainder.Tensor fmod.Tensor floor_divide".split():
    case(_name, X.float(), Y.float())
    case(_name, N, M)
    case(_name, N, -M)
case("remainder.Scalar", N, 3)
case("fmod.Scalar", X, 0.3)
for _exponent in (0, 1, 2, 3, -1, 0.5, 2.0, 2.5): case("pow.Tensor_Scalar", positive(3), _exponent)
case("pow.Tensor_Scalar", X, 3)
case("pow.Tensor_Scalar", N, 2)
case("pow.Tensor_Tensor", positive(3, 4), Y)
case("pow.Scalar", 2, X)
for _name in "eq ne lt le gt ge".split():
    case(f"{_name}.Tensor", N, M)
    case(f"{_name}.Scalar", N, 2)
for _name in "logical_and logical_or logical_xor".split(): case(_name, N, M - 1)
for _name in "bitwise_and bitwise_or bitwise_xor".split():
    case(f"{_name}.Tensor", N, M)
    case(f"{_name}.Tensor", MASK, ~MASK)
case("bitwise_not", N)
case("bitwise_not", MASK)
for _low, _high in ((-1, 1), (None, 0.5), (-0.5, None), (-1.0, 3)):
    case("clamp", EDGES, _low, _high)
    case("clamp", N, _low, _high)
case("clamp.Tensor", X, Y - 1, Y)
case("clamp_min", EDGES, 0.0)
case("clamp_max", EDGES, 1.0)
case("hardtanh", EDGES, 0, 6)
case("softplus", EDGES, 2, 1.5)
case("elu", EDGES, 0.7)
case("elu", EDGES, 0.7, 1.5, 2.0)
case("celu", EDGES, 0.7)
for _slope in (0.2, 0.0, 1.0, 1.5, -0.5): case("leaky_relu", EDGES, _slope)
for _slope in (0.2, 1.0, 1.5): case("leaky_relu", SPECIAL, _slope)
for _name in ("relu6", "hardswish", "hardsigmoid"): case(_name, EDGES.bfloat16())
case("hardtanh", SPECIAL, -1, 6)
case("clamp", SPECIAL, -1, 6)
case("clamp", EDGES.half(), -0.5, 1)
case("clamp_min", N, 1)
case("threshold", EDGES, 0.5, 20)
case("gelu", EDGES, approximate="tanh")
case("prelu", IMAGE, t(4, seed=3))
case("prelu", IMAGE, t(1, seed=3))
case("prelu", EDGES, t(1, seed=3))
case("prelu", SPECIAL, t(1, seed=3))
case("glu", IMAGE, 1)
case("glu", X)
case("lerp.Scalar", X, Y, 0.3)
case("lerp.Tensor", X, Y, t(3, 4, seed=5))
case("addcmul", X, Y, t(3, 4, seed=5), value=0.5)
case("addcdiv", X, Y, positive(3, 4), value=0.5)
case("where.self", MASK, X, Y)
case("where.ScalarOther", MASK, N, 1.5)
case("masked_fill.Scalar", X, MASK, -math.inf)
case("nan_to_num", SPECIAL)
case("nan_to_num", SPECIAL, 1.0, 2.0, 3.0)
for _dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool):
    case("to.dtype", X * 3, _dtype)

# Shapes
case("view", X, [4, 3])
case("reshape", X, [2, -1])
case("permute", IMAGE, [0, -1, 1, 2])
case("transpose.int", IMAGE, -1, 1)
case("t", X)
case("movedim.intlist", IMAGE, [0, 2], [-1, 0])
case("flatten.using_ints", IMAGE, 1, -2)
case("unflatten.int", IMAGE, 1, [2, -1])
case("unsqueeze", X, -1)
case("squeeze", t(1, 3, 1))
case("squeeze.dim", t(1, 3, 1), -1)
case("squeeze.dim", t(1, 3, 1), 1)
case("squeeze.dims", t(1, 3, 1), [0, 2])
case("expand", t(1, 3, 1), [2, -1, 4])
case("expand", t(3, 1), [2, -1, 4])
case("slice.Tensor", IMAGE, 2, 1, 6, 2)
case("slice.Tensor", IMAGE, -1, -4, -1)
case("select.int", IMAGE, 1, -1)
case("narrow", IMAGE, 2, 1, 3)
case("split.Tensor", IMAGE, 3, 2)
case("split_with_sizes", IMAGE, [1, 3], 1)
case("chunk", IMAGE, 4, 2)
case("chunk", IMAGE, 5, -1)
case("tensor_split.sections", IMAGE, 3, 2)
case("tensor_split.indices", IMAGE, [1, 3], 2)
case("unbind.int", IMAGE, 1)
case("cat", [X, Y], -1)
case("cat", [X, N.float()], 0)
case("stack", [X, Y], 1)
case("repeat", X, [2, 1, 3])
case("tile", X, [2])
case("repeat_interleave.self_int", X, 2, 1)
case("roll", IMAGE, [1, -2], [2, 3])
case("roll", X, [2])
case("flip", IMAGE, [-1, 1])
for _k in (0, 1, 2, 3, 5, -1): case("rot90", IMAGE, _k, [2, 3])
case("unfold", LINE, 2, 4, 3)
case("diff", X, 2, 0)
case("tril", X, -1)
case("triu", X, 1)
case("diagonal", IMAGE, 1, 2, 3)
case("diag_embed", X)
case("diag_embed", X, 1)
case("meshgrid.indexing", [t(3), t(4)], indexing="xy")
case("broadcast_tensors", [t(3, 1), t(4)])
case("index.Tensor", IMAGE, [None, whole(2, 3, high=4)])
case("index.Tensor", IMAGE, [None, None, whole(2, high=7), whole(2, high=6)])
case("index.Tensor", X, [whole(2, high=3), None])
case("index_select", IMAGE, 1, whole(5, high=4))
case("gather", X, 1, whole(3, 2, high=4))
case("gather", X, 0, whole(2, 4, high=3))
case("scatter.src", X, 1, torch.tensor([[0, 2], [3, 1]]), t(2, 2))
case("scatter.value", X, 1, torch.tensor([[0, 2], [3, 1]]), 2.5)
case("scatter_add", X, 1, whole(3, 4, high=4), Y)
case("index_add", X, 1, torch.tensor([0, 0, 3]), t(3, 3), alpha=2)
case("index_copy", X, 1, torch.tensor([2, 0]), t(3, 2))
case("index_put", X, [torch.tensor([0, 2])], t(2, 4))
case("index_put", X, [torch.tensor([0, 2]), torch.tensor([1, 1])], t(2), True)
case("index_put", X, [MASK], torch.tensor(0.5, dtype=torch.float64))
case("slice_scatter", IMAGE, t(2, 4, 3, 6), 2, 1, 7, 2)
case("select_scatter", X, t(3), 1, -1)
TIED = torch.tensor([[1.0, 3.0, 0.0, -2.0], [3.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
SOURCE = torch.tensor([[3.0, 0.0, 1.0], [3.0, 3.0, 5.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
for _reduce in ("sum", "prod", "mean", "amax", "amin"):
    for _own in (True, False):
        case("scatter_reduce.two", TIED, 1, whole(3, 3, high=4), SOURCE, _reduce, include_self=_own)
        case("scatter_reduce.two", TIED, 0, whole(3, 3, high=3), SOURCE, _reduce, include_self=_own)
        case("scatter_reduce.two", N, 1, whole(3, 2, high=4), M, _reduce, include_self=_own)
        case("scatter_reduce.two", t(2, 3, 4).float(), -1, whole(2, 3, 5, high=4), t(2, 3, 5).float(), _reduce,
             include_self=_own)
        case("scatter_reduce.two", torch.tensor(2.0), 0, torch.tensor(0), torch.tensor(3.0), _reduce,
             include_self=_own)
case("scatter_reduce.two", torch.tensor([1.0, math.nan, -math.inf]), 0, torch.tensor([0, 2, 0]),
     torch.tensor([math.nan, 4.0, 2.0]), "amax")
case("histc", X, 5, -1, 1)
case("histc", X.float(), 7)
case("histc", torch.tensor([0.0, 1.0, 0.5, 0.25, 2.0, -1.0, math.nan, math.inf]), 4, 0, 1)
case("histc", torch.full((5,), 2.0), 3)
case("histc", torch.linspace(-3, 3, 1000), 100, -2.5, 2.5)
case("as_strided", X, [2, 3], [1, 4])
case("as_strided", X, [3, 2, 2], [4, 1, 1], 1)
case("as_strided", LINE, [4, 3, 2], [5, 1, 7], 3)
case("embedding", t(6, 3), whole(2, 4, high=6))
case("embedding", t(6, 3), whole(2, 4, high=6), 2)
case("one_hot", whole(3, high=4), 4)
case("bucketize.Tensor", X, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
for _args in ((5,), (2, 9), (0, 9, 2), (0.0, 1.0, 0.3), (5, 0, -2)):
    case("arange" + {1: "", 2: ".start", 3: ".start_step"}[len(_args)], *_args)
case("linspace", -1.0, 1.0, 7)
case("linspace", 0, 5, 1)
case("full", [2, 3], 2)
case("full", [2], 0.5)
case("full_like", N, 3)
case("zeros_like", N)
case("new_zeros", X, [2])
case("eye", 3)
case("tril_indices", 3, 4, 1)

# Reductions
for _name in "sum mean prod amax amin logsumexp var std argmax argmin".split():
    for _dim in (1, -1):
        _overload = {"sum": ".dim_IntList", "mean": ".dim", "prod": ".dim_int", "var": ".dim",
                     "std": ".dim"}.get(_name, "")
        _dims = _dim if _name in ("prod", "argmax", "argmin") else [_dim]
        case(_name + _overload, IMAGE, _dims)
for _name in "sum mean prod max min".split(): case(_name, X)
case("sum", N.int())
case("sum", MASK)
case("sum.dim_IntList", X.half(), [0], True)
case("amax", torch.tensor([[1.0, 3.0, 3.0]], dtype=torch.float64), [1])
case("max.dim", torch.tensor([[1.0, 3.0, 3.0]], dtype=torch.float64), 1)
case("min.dim", IMAGE, -2, True)
case("max.other", X, Y)
case("max", SPECIAL)
case("argmax", X)
case("any", MASK)
case("any.dim", MASK, 1)
case("all.dim", MASK, 1, True)
case("var.correction", IMAGE, [2, 3], correction=0, keepdim=True)
case("var_mean.correction", IMAGE, [1], correction=1)
case("std.correction", X, None, correction=0)
for _ord in (2, 1, 0, math.inf, -math.inf, 3): case("linalg_vector_norm", X, _ord, [1], True)
case("linalg_vector_norm", torch.zeros(2, 3, dtype=torch.float64), 2, [1])
case("norm.ScalarOpt_dim", X, 2, [0])
case("cumsum", X, 1)
case("cumsum", N.int(), 0)
case("cumprod", X, 1)
case("sort", X, 1)
case("sort", N, 1, True)
case("topk", X, 2, 1)
case("topk", X, 2, 0, False)
case("argsort", X, 1, True)
case("kthvalue", X, 2, 1)
case("median.dim", X, 1)
case("median", X)
for _name in "softmax.int log_softmax.int".split():
    case(_name, IMAGE, 1)
    case(_name, X.half(), -1)
    case(_name, X.float() * 100, -1)
    case(_name, X.half(), -1, torch.float32)

# Products
case("linear", X, t(5, 4), t(5))
case("linear", t(2, 3, 4), t(5, 4))
case("linear", t(4), t(5, 4), t(5))
case("matmul", t(2, 1, 3, 4), t(3, 4, 2))
case("matmul", t(3, 4), t(4))
case("matmul", N, M.T)
case("bmm", t(2, 3, 4), t(2, 4, 5))
case("addmm", t(5), X, t(4, 5), beta=0.5, alpha=2)
case("addbmm", t(3, 5), t(2, 3, 4), t(2, 4, 5), beta=0.5, alpha=2)
case("baddbmm", t(2, 3, 5), t(2, 3, 4), t(2, 4, 5), beta=0.5, alpha=2)
case("einsum", "bchw,bcxy->bhwxy", [IMAGE, IMAGE])
case("bilinear", X, t(3, 5), t(2, 4, 5), t(2))
case("cdist", t(2, 3, 4), t(2, 5, 4))
case("cosine_similarity", X, Y)
case("dot", t(4), t(4, seed=1))
case("outer", t(4), t(3))
Q, K, V = t(2, 2, 5, 4), t(2, 2, 7, 4, seed=1), t(2, 2, 7, 3, seed=2)
case("scaled_dot_product_attention", Q, K, V)
case("scaled_dot_product_attention", Q, K, V, t(5, 7))
case("scaled_dot_product_attention", Q, K, V, t(2, 1, 5, 7) > -1)
case("scaled_dot_product_attention", Q, K, V, None, 0.0, True)
case("scaled_dot_product_attention", Q, K, V, scale=0.3)
case("scaled_dot_product_attention", Q[0], K[0], V[0])
case("scaled_dot_product_attention", Q.float(), K.float(), V.float(), None, 0.0, True)

# Convolutions, norms, pooling
case("conv2d", IMAGE, t(6, 2, 3, 3), t(6), [2, 1], [1, 0], [1, 2], 2)
case("conv2d.padding", IMAGE, t(6, 4, 3, 2), None, [1, 1], "same", [2, 1])
case("conv1d", LINE, t(6, 4, 3), t(6), [2], [1])
case("conv3d", VOLUME, t(4, 2, 2, 3, 2), t(4), [1, 1, 2])
case("conv_transpose1d", LINE, t(4, 3, 4), t(6), [2], [1], [1], 2, [2])
case("conv_transpose2d.input", IMAGE, t(4, 3, 3, 3), None, [2, 2], [1, 1], [1, 1])
case("conv_transpose3d.input", VOLUME, t(2, 3, 2, 2, 2), t(3), [2, 2, 2])
case("convolution", IMAGE, t(4, 3, 3, 3), None, [2, 2], [1, 1], [1, 1], True, [1, 1], 1)
for _affine in (True, False):
    _weight, _bias = (t(4), t(4, seed=1)) if _affine else (None, None)
    case("group_norm", IMAGE, 2, _weight, _bias)
    case("group_norm", IMAGE.float(), 2, *(v if v is None else v.float() for v in (_weight, _bias)))
    case("instance_norm", IMAGE, _weight, _bias, None, None, True, 0.1, 1e-5, False)
case("layer_norm", X, [4], t(4), t(4, seed=1))
case("layer_norm", IMAGE, [7, 6], t(7, 6), None, 1e-3)
case("layer_norm", X.float(), [4], t(4).float(), t(4, seed=1).float(), 1e-3)
case("layer_norm", X.float(), [4], t(4).float())
case("layer_norm", X.bfloat16(), [4])
case("layer_norm", X.half(), [4], t(4).half(), t(4, seed=1).half())
case("rms_norm", X, [4], t(4), 1e-6)
case("rms_norm", X, [4])
case("_weight_norm", t(3, 4, 2), t(3, 1, 1), 0)
case("_weight_norm", t(3, 4, 2), t(1, 4, 1), 1)
for _args in (([3, 2],), ([3, 2], [2, 1], [1, 1], [1, 2], True), (2, 2, 0, 1, True)):
    _listed = [a if isinstance(a, (list, bool)) else [a, a] for a in _args]
    case("max_pool2d", IMAGE, *_listed)
    case("max_pool2d_with_indices", IMAGE, *_listed)
case("max_pool1d", LINE, [3], [2], [1])
case("max_pool3d", VOLUME, [2, 2, 3])
case("avg_pool2d", IMAGE, [3, 2], [2, 2], [1, 1], True, False)
case("avg_pool2d", IMAGE, [3, 3], [2, 2], [1, 1], True, True)
case("avg_pool2d", IMAGE, [2, 2], [1, 1], [0, 0], False, True, 3)
case("avg_pool1d", LINE, [3])
case("avg_pool3d", VOLUME, [2, 2, 2])
for _size in ([1, 1], [3, 4], [7, 6], [9, 2]):
    case("adaptive_avg_pool2d", IMAGE, _size)
    case("adaptive_max_pool2d", IMAGE, _size)
case("adaptive_avg_pool1d", LINE, [4])
case("adaptive_avg_pool3d", VOLUME, [2, 3, 1])
case("adaptive_max_pool1d", LINE, [4])
for _size, _scales in (([14, 12], None), (None, [2.0, 2.0]), (None, [0.5, 1.7]), ([5, 13], None)):
    case("upsample_nearest2d.vec", IMAGE, _size, _scales)
    case("_upsample_nearest_exact2d.vec", IMAGE, _size, _scales)
    for _corners in (False, True):
        case("upsample_bilinear2d.vec", IMAGE, _size, _corners, _scales)
        case("upsample_bicubic2d.vec", IMAGE, _size, _corners, _scales)
        case("_upsample_bilinear2d_aa.vec", IMAGE, _size, _corners, _scales)
        case("_upsample_bicubic2d_aa.vec", IMAGE, _size, _corners, _scales)
case("upsample_nearest1d.vec", LINE, None, [3.0])
case("upsample_linear1d.vec", LINE, [5], True, None)
case("upsample_nearest3d.vec", VOLUME, None, [2.0, 1.0, 1.5])
case("upsample_trilinear3d.vec", VOLUME, [3, 8, 6], False, None)
case("upsample_bilinear2d", IMAGE, [14, 12], False, 2.0, 2.0)
GRID = t(2, 5, 3, 2, scale=0.9)
for _mode in (0, 1, 2):
    for _padding in (0, 1, 2):
        for _corners in (False, True): case("grid_sampler", IMAGE, GRID, _mode, _padding, _corners)
case("grid_sampler", VOLUME, t(1, 2, 3, 2, 3, scale=0.7), 0, 0, False)
case("affine_grid_generator", t(2, 2, 3), [2, 1, 4, 5], False)
case("affine_grid_generator", t(2, 2, 3), [2, 1, 4, 5], True)
for _mode in ("constant", "reflect", "replicate", "circular"): case("pad", IMAGE, [1, 2, 2, 0], _mode)
case("constant_pad_nd", IMAGE, [1, -1, 2, 0], 0.5)
case("reflection_pad1d", LINE, [2, 1])
case("replication_pad3d", VOLUME, [1, 1, 0, 2, 1, 0])
case("pixel_shuffle", t(2, 8, 3, 2), 2)
case("pixel_unshuffle", t(2, 3, 4, 6), 2)
case("channel_shuffle", IMAGE, 2)
case("im2col", IMAGE, [3, 2], [1, 2], [1, 0], [2, 1])
case("col2im", t(2, 12, 16), [5, 5], [2, 2], [1, 1], [0, 0], [1, 1])
case("mse_loss", X, Y)
case("smooth_l1_loss", X, Y, 1, 0.5)
case("huber_loss", X, Y, 2, 0.7)
case("fft_rfft", X.float())
case("fft_irfft", X.float(), 6, 1, "ortho")
case("fft_rfft2", IMAGE.float(), None, [-2, -1], "ortho")
case("fft_fft2", IMAGE.float())

for _name in "arcsin arccos arctanh".split(): case(_name, torch.tanh(X) * 0.9)
for _name in "arctan arcsinh special_exp2 special_sinc special_round rad2deg conj_physical".split(): case(_name, X)
case("arctan2", X, Y)
case("ldexp.Tensor", X, whole(3, 4))
case("xlogy.Tensor", X.relu(), Y.abs() + 0.1)
case("xlogy.Tensor", torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0]), torch.tensor([0.0, math.nan, math.inf, 0.0, -1.0]))
case("xlogy.Scalar_Other", Y, 2.5)
case("heaviside", EDGES.float(), torch.full((10,), 0.5))
case("heaviside", torch.tensor([math.nan, 0.0]), torch.tensor([1.0, math.nan]))
for _name, _x in (("vsplit", IMAGE), ("hsplit", IMAGE), ("dsplit", t(2, 3, 4))):
    case(f"{_name}.int", _x, 2)
    case(f"{_name}.array", _x, [1, 2])
case("hsplit.int", t(6), 3)
for _name in ("fliplr", "flipud", "ravel", "adjoint", "diagflat", "msort"): case(_name, X)
case("dstack", [X, Y])
case("dstack", [t(4), t(4)])
case("row_stack", [t(4), X])
case("unsafe_chunk", X, 3, 1)
case("sum_to_size", t(2, 3, 4), [3, 1])
case("sum_to_size", X, [3, 4])
case("block_diag", [X, t(5), torch.tensor(2.0, dtype=torch.float64), t(2, 1)])
case("masked_scatter", X, MASK, Y)
case("masked_scatter", X, MASK[:, :1], t(20))
case("diagonal_scatter", t(3, 4, 2), t(2, 3), 1)
case("isin.Tensor_Tensor", N, M)
case("isin.Tensor_Tensor", N, M, invert=True)
for _right in (False, True):
    case("searchsorted.Tensor", torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.tensor([[0.0, 2.0], [5.0, 9.0]]), right=_right)
    case("searchsorted.Tensor", X.sort(1)[0], X * 1.5, right=_right, out_int32=True)
for _name in ("cummax", "cummin"):
    case(_name, t(4, 5), 1)
    case(_name, whole(4, 6), 0)
    case(_name, torch.tensor([1.0, 3.0, 3.0, math.nan, 4.0, math.nan, 1.0]), -1)
case("nansum", torch.tensor([[1.0, math.nan], [2.0, 3.0]]), [1])
case("nansum", X)
case("nanmean", torch.tensor([[1.0, math.nan], [2.0, 3.0]]), [0], True)
case("nanmean", X, [1])
case("linalg_norm", X)
case("linalg_norm", X, 3, [1])
for _order in (1, -1, math.inf, -math.inf):
    case("linalg_norm", X, _order)
    case("linalg_matrix_norm", IMAGE, _order, [1, -1], True)
case("linalg_norm.ord_str", X, "fro")
case("linalg_matrix_norm.str_ord", IMAGE)
case("frobenius_norm.dim", X, [1])
case("dist", X, Y)
case("pairwise_distance", X, Y)
case("pairwise_distance", X, Y, 1.0, 1e-3, True)
case("linalg_matmul", X, t(4, 2))
case("inner", X, t(2, 4))
case("addr", X, t(3), t(4), beta=0.5, alpha=2)
case("linalg_vecdot", X, Y)
case("linalg_vecdot", X, Y, dim=0)
case("linalg_multi_dot", [X, t(4, 5), t(5, 2)])
case("conv_tbc", t(9, 2, 3), t(3, 3, 4), t(4), 1)
LOGS, RIGHT = t(4, 5).log_softmax(1), torch.tensor([1, 4, -100, 0])
for _reduction in (0, 1, 2):
    for _weight in (None, positive(5)):
        case("nll_loss_nd", LOGS, RIGHT, _weight, _reduction)
        case("nll_loss_nd", IMAGE, whole(2, 7, 6, high=4), positive(4), _reduction, 2)
        for _smoothing in (0.0, 0.2):
            case("cross_entropy_loss", t(4, 5), RIGHT, _weight, _reduction, -100, _smoothing)
            case("cross_entropy_loss", t(4, 5), t(4, 5, seed=2).softmax(1), _weight, _reduction, -100, _smoothing)
        case("cross_entropy_loss", t(5), torch.tensor(3), _weight, _reduction, -100, 0.1)
    case("cross_entropy_loss", IMAGE, whole(2, 7, 6, high=4), None, _reduction, 1, 0.3)
    case("binary_cross_entropy_with_logits", 30 * X, (Y > 0).double(), None, None, _reduction)
    case("binary_cross_entropy_with_logits", X, Y.sigmoid(), positive(3, 4), positive(4), _reduction)
    case("kl_div", X, Y.softmax(1), _reduction)
    case("kl_div", X, Y, _reduction, log_target=True)
    case("binary_cross_entropy", Y.sigmoid(), X.sigmoid(), None, _reduction)
    case("binary_cross_entropy", Y.sigmoid(), (X > 0).double(), positive(3, 4), _reduction)
    case("binary_cross_entropy", torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0, 1.0]), None, _reduction)
    case("triplet_margin_loss", X, Y, X * Y, 1.0, 2.0, 1e-6, True, _reduction)
    case("triplet_margin_loss", X, Y, X * Y, 0.5, 1.0, 1e-6, False, _reduction)
case("matrix_H", X)
case("repeat_interleave.self_Tensor", X, torch.tensor([1, 0, 2]), 0, output_size=3)
case("repeat_interleave.self_Tensor", X, torch.tensor([2]), -1, output_size=8)
case("repeat_interleave.self_Tensor", X, whole(12), output_size=int(whole(12).sum()))
CELL = t(2, 3), t(2, 4), t(4, 3), t(4, 4)
for _name in ("rnn_tanh_cell", "rnn_relu_cell"):
    case(_name, *CELL, t(4), t(4, seed=1))
    case(_name, *CELL)
case("gru_cell", t(2, 3), t(2, 4), t(12, 3), t(12, 4), t(12), t(12, seed=1))
case("lstm_cell", t(2, 3), [t(2, 4), t(2, 4, seed=1)], t(16, 3), t(16, 4), t(16), t(16, seed=1))

UNTRAINED = {"nll_loss_nd": {2}, "cross_entropy_loss": {2}, "binary_cross_entropy_with_logits": {2, 3}, "binary_cross_entropy": {2}}  # weights
SMOOTH_ONLY = {"sort", "argsort"}


def identity(case):
    name, args, kwargs = case
    shown = [str(tuple(a.shape)) if isinstance(a, torch.Tensor) else str(a)[:24] for a in args]
    return f"{name}-{'-'.join(shown)}{'-' + str(kwargs) if kwargs else ''}"


def ours_of(value):
    "An argument as ours: arrays for tensors, MLX's dtypes."
    if isinstance(value, torch.Tensor): return _as_array(value)
    if isinstance(value, torch.dtype): return getattr(mx, {"bool": "bool_"}.get(
        name := str(value).removeprefix("torch."), name))
    if isinstance(value, (list, tuple)): return [ours_of(item) for item in value]
    return value


def results(value): return list(value) if isinstance(value, (tuple, list)) else [value]


def close(ours, theirs, dtype):
    assert ours.shape == tuple(theirs.shape)
    assert str(ours.dtype).rpartition(".")[2].rstrip("_") == str(theirs.dtype).rpartition(".")[2]
    bound = {torch.float64: 2e-6, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2,
             torch.complex64: 2e-5}.get(theirs.dtype, 0)
    if theirs.dtype == torch.bfloat16: ours, theirs = ours.astype(mx.float32), theirs.float()
    np.testing.assert_allclose(np.array(ours), theirs.numpy(), rtol=bound, atol=bound)


def called(name, args, kwargs):
    "PyTorch's result and the name of ours."
    base, _, overload = name.partition(".")
    packet = getattr(ATEN, base)
    return getattr(packet, overload) if overload else packet


@pytest.mark.parametrize("case", CASES, ids=identity)
def test_operation(case):
    "Shapes, dtypes, numbers and gradients are PyTorch's."
    name, args, kwargs = case
    base, _, overload = name.partition(".")
    ours = OPERATIONS.get(f"{base}_{overload}", OPERATIONS.get(base))
    function = called(name, args, kwargs)
    trained = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.dtype == torch.float64
               and bool(torch.isfinite(a).all()) and i not in UNTRAINED.get(base, ())]
    fresh = [a.clone().requires_grad_() if i in trained else a for i, a in enumerate(args)]
    right = results(function(*fresh, **kwargs))
    given = [ours_of(a) for a in args]
    named = {key: ours_of(value) for key, value in kwargs.items()}
    found = results(ours(*given, **named))
    if base in ("instance_norm",): found = found[:1]
    assert len(found) == len(right)
    for a, b in zip(found, right): close(a, b.detach(), b.dtype)
    smooth = [i for i, y in enumerate(right) if y.requires_grad]
    if not trained or not smooth: return
    factors = {i: t(*right[i].shape, seed=9) for i in smooth}
    theirs = torch.autograd.grad(sum((right[i] * factors[i]).sum() for i in smooth),
                                 [fresh[i] for i in trained], allow_unused=True)

    def loss(*values):
        full = list(given)
        for i, value in zip(trained, values): full[i] = value
        outputs = results(ours(*full, **named))
        return sum((outputs[i] * _as_array(factors[i])).sum() for i in smooth)
    gradients = mx.grad(loss, tuple(range(len(trained))))(*(given[i] for i in trained))
    for a, b in zip(results(gradients), theirs):
        close(a, torch.zeros(a.shape, dtype=torch.float64) if b is None else b, torch.float64)


VIEWS = {
    "slice": (lambda v: v[:, 1:3], lambda v: v[:, 1:3]),
    "step": (lambda v: v[::2, -1], lambda v: v[::2, -1]),
    "transpose": (lambda v: v.mT[1:, ..., 0], lambda v: mx.swapaxes(v, -1, -2)[1:, ..., 0]),
    "reshape": (lambda v: v.view(-1)[5:], lambda v: v.reshape(-1)[5:]),
    "diagonal": (lambda v: v.diagonal(0, 0, 1), lambda v: mx.diagonal(v, 0, 0, 1)),
}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.int32, torch.bool))
@pytest.mark.parametrize("view", VIEWS)
def test_write(view, dtype):
    "A write through a view reaches what it looks at, and gradients go where values went."
    theirs, ours = VIEWS[view]
    x = t(4, 5, 2).to(dtype)
    right = x.clone()
    values = t(*theirs(right).shape, seed=2).to(dtype)
    theirs(right).copy_(values)
    close(write(_as_array(x), ours, _as_array(values)), right, dtype)
    if dtype != torch.float64: return
    a, b = x.clone().requires_grad_(), values.clone().requires_grad_()
    y = a * 1
    theirs(y).copy_(b)
    factor = t(4, 5, 2, seed=3)
    wanted = torch.autograd.grad((y * factor).sum(), [a, b])
    found = mx.grad(lambda a, b: (write(a, ours, b) * _as_array(factor)).sum(), (0, 1))(
        _as_array(x), _as_array(values))
    for ours, theirs in zip(found, wanted): close(ours, theirs, torch.float64)


RECURRENT = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}


@pytest.mark.parametrize("both", (False, True))
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrence(kind, both):
    "Two layers, in one direction and in both, with a batch first."
    torch.manual_seed(0)
    layer = getattr(torch.nn, kind)(3, 4, 2, bidirectional=both, batch_first=True).double()
    x, count = t(2, 5, 3), 2 * (1 + both)
    state = tuple(t(count, 2, 4, seed=i) for i in range(2 if kind == "LSTM" else 1))
    y, last = layer(x, state if kind == "LSTM" else state[0])
    weights = [_as_array(w) for w in layer._flat_weights]
    ours = [_as_array(s) for s in state]
    found = OPERATIONS[RECURRENT[kind]](_as_array(x), ours if kind == "LSTM" else ours[0], weights,
                                        True, 2, 0.0, False, both, True)
    for a, b in zip(found, (y, *(last if kind == "LSTM" else (last,)))): close(a, b.detach(), b.dtype)


@pytest.mark.parametrize("center, normalized, length", ((True, False, None), (False, True, None),
                                                        (True, False, 61)))
def test_spectra(center, normalized, length):
    "Frames of a signal and the way back."
    x, window = t(2, 64).float(), torch.hann_window(12) + 0.1
    right = torch.stft(x, 16, 4, 12, window, center, normalized=normalized, return_complex=True)
    found = OPERATIONS["stft_center"](_as_array(x), 16, 4, 12, _as_array(window), center, "reflect",
                                      normalized, None, True)
    close(found, right, right.dtype)
    back = torch.istft(torch.stft(x, 16, 4, 16, None, True, return_complex=True), 16, 4, length=length)
    again = OPERATIONS["istft"](_as_array(torch.stft(x, 16, 4, 16, None, True, return_complex=True)),
                                16, 4, length=length)
    close(again, back, back.dtype)


def test_unpooling():
    "Maxima go back to their places."
    values, places = torch.nn.functional.max_pool2d(IMAGE, 2, return_indices=True)
    right = torch.nn.functional.max_unpool2d(values, places, 2, output_size=(7, 6))
    close(OPERATIONS["max_unpool2d"](_as_array(values), _as_array(places), (7, 6)), right, right.dtype)


def test_batch_statistics():
    "Over thousands of values far from zero they are exact but for a few roundings."
    x = t(2, 4, 96, 96).float() + 5
    _, mean, variance = OPERATIONS["batch_norm"](_as_array(x), None, None, mx.zeros(4), mx.zeros(4), True, 1.0)
    assert np.abs(np.array(mean) - x.double().mean((0, 2, 3)).numpy()).max() < 5e-6
    assert np.abs(np.array(variance) - x.double().var((0, 2, 3)).numpy()).max() < 1e-6


@pytest.mark.parametrize("given", ((True, True), (True, False), (False, False)))
def test_gradients_of_layer_norm_in_float32(given):
    "MLX's own operation, which has no float64, and is another one there."
    tensors = [t(3, 5).float(), *(t(5, seed=i).float() if there else None for i, there in enumerate(given))]
    fresh = [v if v is None else v.clone().requires_grad_() for v in tensors]
    factor = t(3, 5, seed=7).float()
    there = [i for i, v in enumerate(tensors) if v is not None]
    right = torch.autograd.grad((ATEN.layer_norm(fresh[0], [5], *fresh[1:]) * factor).sum(),
                                [fresh[i] for i in there])

    def loss(*values):
        full = dict(zip(there, values))
        y = OPERATIONS["layer_norm"](full[0], [5], full.get(1), full.get(2))
        return (y * _as_array(factor)).sum()
    found = mx.grad(loss, tuple(range(len(there))))(*(_as_array(tensors[i]) for i in there))
    for a, b in zip(results(found), right): close(a, b, torch.float32)


@pytest.mark.parametrize("name", ("dropout", "feature_dropout", "alpha_dropout",
                                  "feature_alpha_dropout"))
def test_dropout(name):
    "As many values are dropped as are asked for, whole channels by those that say so."
    x = mx.ones((20, 50, 4, 4))
    y = np.array(OPERATIONS[name](x, 0.25, True))
    kept = y == y.max()
    assert 0.7 < kept.mean() < 0.8
    assert ("feature" in name) == bool((kept == kept[:, :, :1, :1]).all())
    assert np.array_equal(OPERATIONS[name](x, 0.25, False), x)
    if "alpha" not in name: assert abs(y.mean() - 1) < 0.1


@pytest.mark.parametrize("name, low, high", (("rand", 0, 1), ("randn", -8, 8)))
def test_random(name, low, high):
    "Numbers are drawn anew, in the range of their kind."
    a, b = (np.array(OPERATIONS[name]((50, 4), dtype=mx.float32)) for _ in range(2))
    assert a.min() >= low and a.max() <= high and not np.array_equal(a, b)
