"""One case of fuzz.py, judged: the same refusal as PyTorch's, or equal results and gradients."""
from contextlib import ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import oracle
import torch

import flashconv as fc
import flashconv.functional as F
from flashconv.algorithms import choice, derivatives, fft, overlap, tiles, weights
from fuzz import MODES

DTYPES = {str(d).rpartition(".")[2]: d for d in (*oracle.EPS, *oracle.INTEGERS)}


def verdict(case):
    "A word for what happened, and what is wrong, or None."
    try: return judge(case), None
    except AssertionError as error: return "wrong", str(error)
    except Exception as error: return "error", f"{type(error).__name__}: {error}"


def judge(case):
    """'equal' or 'refused' (by both).

    Any exception is a failure of ours, or one of PyTorch's that has to be named here.
    """
    dtype, ours, theirs = DTYPES[case.get("dtype", "float32")], _ours(case), _theirs(case)
    with oracle.where(dtype), _tiles_of(case.get("tile")), _watched() as seen, _forced(case, ours):
        f, g = _transformed(case, ours, theirs)
        words = [_judged(shapes, ours, theirs, f, g, dtype, seen) for shapes in _shapes(case)]
    return words[0]


def _judged(case, ours, theirs, f, g, dtype, seen):
    "The same for one set of shapes. `f` and `g` are the transformed `ours` and `theirs`."
    one = [oracle.draw(np.random.default_rng(0), *of) for of in _examples(case)]
    # PyTorch skips some checks for an empty batch, so a batch of one says what is legal.
    tensors = [_to_torch(a) for a in one]
    if case.get("wrong") == "dtype": tensors[1] = tensors[1].to(torch.float32)
    if case["batch"] == 0: tensors[0] = tensors[0].new_zeros(1, *tensors[0].shape[1:])
    judged, mine = _outcome(theirs, *tensors), _outcome(ours, *one)
    if _turns_more_than_once(case):
        assert isinstance(mine, RuntimeError), "more than one turn of the ring"
        return "refused"
    if isinstance(mine, RuntimeError) and "without overflow" in str(mine):
        return "refused"  # as PyTorch does, but where nothing of the input is left: there it wraps
    if isinstance(judged, Exception):
        # PyTorch pads to no result without elements in some ranks, and gives it in others.
        if _mode(case) in MODES and isinstance(mine, mx.array) and mine.size == 0: return "refused"
        # Before the call sizes or amounts are worked out beside `output_size` or a padding mode:
        # there PyTorch trips over a tuple of length 1, and the type of our refusal is free.
        if type(judged) is IndexError: return "refused"
        free = "size" in case or _mode(case) in MODES
        same = isinstance(mine, Exception if free else type(judged))
        assert same, f"no refusal as PyTorch's {judged!r}, but {mine!r:.200}"
        return "refused"
    shape = tuple(judged.shape)
    if case["batch"] == 0: shape = (0, *shape[1:])
    if _mode(case) in MODES and 0 in shape:  # PyTorch's gradient is uninitialised memory
        assert mine.shape == shape, f"shape {mine.shape}, PyTorch has {shape}"
        return "equal"
    arrays = _arrays(case, shape)
    if dtype in oracle.INTEGERS:
        result = g(*map(_to_torch, arrays))
        oracle.assert_equal(f(*arrays), result.to(getattr(torch, case["dtype"])), "integers")
    else: oracle.check(f, g, arrays, assertion=_assertion(seen))
    return "equal"


def _mode(case): return case["kw"].get("mode", case["kw"].get("padding_mode"))


def _turns_more_than_once(case):
    "PyTorch returns uninitialised memory for some of these."
    if case["kind"] != "pad" or _mode(case) != "circular": return False
    pairs = zip(case["kw"]["pad"][::2], case["kw"]["pad"][1::2], reversed(case["sizes"]))
    return any(max(a, b) > size + min(a, 0) + min(b, 0) for a, b, size in pairs)


def _to_torch(a):
    "As the oracle does it, and integers as int64: PyTorch transposes no others."
    t = oracle.to_torch(a)
    return t if t.is_floating_point() or t.is_complex() else t.to(torch.int64)


def _assertion(seen):
    "Transforms spread their rounding over all values; whether one ran is known afterwards."
    def within(ours, judged, bound, *rest):
        if not any(name == "fft" for name, *_ in seen):
            return oracle.assert_within_rounding(ours, judged, bound, *rest)
        # No value may be in reach of any output: what rounds then are values of about 1.
        oracle.assert_within_norm(ours, judged, bound if bound.any() else bound + 1, *rest)
    return within


def _outcome(f, *args):
    try: return f(*args)
    except (RuntimeError, ValueError, TypeError, IndexError) as error: return error


# What is called ------------------------------------------------------------------------------

def _name(case): return f"{case['kind']}{len(case['sizes'])}d"


def _keywords(case):
    kw = {k: tuple(v) if isinstance(v, list) else v for k, v in case["kw"].items()}
    return kw if case["kind"] == "pad" else kw | {"groups": case["groups"]}


def _layer(case, L, dtype, **kw):
    group = max(1, case["groups"])
    channels = [n * group for n in (case["in"], case["out"])]
    if case["kind"].startswith("Lazy"): del channels[0]
    return getattr(L, _name(case))(*channels, tuple(case["kernel"]), bias=case.get("bias", False),
                                   dtype=dtype, **_keywords(case), **kw)


def _call_of(case, call):
    "With `output_size`, where the case has one."
    return (lambda x: call(x, case["size"])) if "size" in case else call


def _ours(case):
    kw, n = _keywords(case), len(case["sizes"])
    if case.get("last"): kw["data_format"] = "channels_last"

    def function(x, *rest):
        if not case["kind"].startswith(("Conv", "Lazy")): return getattr(F, name)(x, *rest, **kw)
        layer = _layer(case, fc, x.dtype, data_format=kw.get("data_format", "channels_first"))
        if "Lazy" in name: _call_of(case, layer)(x)
        layer.weight, *bias = rest
        if bias: layer.bias, = bias
        return _call_of(case, layer)(x)

    def channels_last(x, *rest):
        channels = x.ndim - n - 1
        return mx.moveaxis(function(mx.moveaxis(x, channels, -1), *rest), -1, channels)

    name = "pad" if case["kind"] == "pad" else _name(case)
    return channels_last if case.get("last") else function


def _theirs(case):
    def function(x, *rest):
        if case["kind"] == "pad": return torch.nn.functional.pad(x, **_keywords(case))
        if not case["kind"].startswith(("Conv", "Lazy")):
            return getattr(torch.nn.functional, _name(case))(x, *rest, **_keywords(case))
        layer = _layer(case, torch.nn, x.dtype)
        if "Lazy" in case["kind"]: _call_of(case, layer)(x.detach())
        state = dict(zip(("weight", "bias"), rest))
        return _call_of(case, lambda *a: torch.func.functional_call(layer, state, a))(x)
    return function


# With which arrays ---------------------------------------------------------------------------

def _examples(case):
    "Shape and dtype of each array of a single call."
    dtype, wrong = DTYPES[case.get("dtype", "float32")], case.get("wrong")
    group, batch = max(1, case.get("groups", 1)), [] if case["batch"] is None else [case["batch"]]
    x = [*batch, case["in"] * group + (wrong == "channels"), *case["sizes"]]
    if wrong == "rank": x.append(3)
    if case["kind"] == "pad": return [(x, dtype)]
    into, out = case["in"], case["out"]
    w = [into * group, out] if "ranspose" in case["kind"] else [out * group, into]
    other = mx.float16 if dtype == mx.float32 else mx.float32
    bias = [([out * group + (wrong == "bias")], dtype)] if case.get("bias") else []
    return [(x, dtype), ([*w, *case["kernel"]], other if wrong == "dtype" else dtype), *bias]


def _arrays(case, y_shape):
    "All arrays of the transformed call, evaluated."
    rng, examples = np.random.default_rng(case["seed"]), _examples(case)
    if "of" in case: examples.append((list(y_shape), examples[0][1]))
    many = rng.integers(1, 4).item()
    for (shape, _), axis in zip(examples, case.get("axes", ())):
        if axis is not None: shape.insert(axis % (len(shape) + 1), many)
    views = case.get("views", [])
    views = views + [None] * (len(examples) - len(views))
    arrays = [_view(rng, view, *of) for view, of in zip(views, examples)]
    if "jvp" in case: arrays += [oracle.draw(rng, *of) for of in examples]
    mx.eval(arrays)
    return arrays


def _view(rng, view, shape, dtype):
    "An array of that shape, and how it lies in memory."
    if view == "transposed": return oracle.draw(rng, shape[::-1], dtype).transpose()
    if view == "sliced":
        steps = rng.integers(1, 3, len(shape)).tolist()
        whole = oracle.draw(rng, [2 * n + 2 for n in shape], dtype)
        return whole[tuple(slice(1, 1 + n * step, step) for n, step in zip(shape, steps))]
    if view == "reversed":
        return oracle.draw(rng, shape, dtype)[(slice(None, None, -1),) * len(shape)]
    if view == "broadcast":
        axis = rng.integers(len(shape)).item()
        thin = [*shape[:axis], 1, *shape[axis + 1 :]]
        return mx.broadcast_to(oracle.draw(rng, thin, dtype), shape)
    return oracle.draw(rng, shape, dtype)


def _shapes(case):
    "The case, and where it is compiled the same with other shapes in between."
    if "compile" not in case: return [case]
    longer = case | {"sizes": [size + 1 for size in case["sizes"]]}
    more = case | {"batch": None if case["batch"] is None else case["batch"] + 1}
    return [case, longer, more, case]


# What is done to the call --------------------------------------------------------------------

def _transformed(case, f, g):
    "Both functions: the gradient by one argument, vmapped, forward-mode derivative, compiled."
    if "of" in case: f, g = our_gradient(f, case["of"]), their_gradient(g, case["of"])
    if "axes" in case: f, g = mx.vmap(f, in_axes=tuple(case["axes"])), looped(g, case["axes"])
    if "jvp" in case: f, g = _our_jvp(f), _their_jvp(g)
    return mx.compile(f) if "compile" in case else f, g


def our_gradient(f, i):
    "The `i`th gradient of `f` as a function of its arguments and the cotangent."
    return lambda *a: mx.vjp(f, list(a[:-1]), [a[-1]])[1][i]


def their_gradient(f, i):
    def gradient(*a):
        leaves = _leaves(a[:-1])
        return torch.autograd.grad(f(*leaves), leaves[i], a[-1], create_graph=True)[0]
    return gradient


def _leaves(tensors): return [t.requires_grad_() if t.is_leaf else t for t in tensors]


def looped(f, axes, out=0):
    "What vmap means, by PyTorch: one call after the other."
    def loop(*tensors):
        pairs = list(zip(tensors, axes))
        size = next(t.shape[axis] for t, axis in pairs if axis is not None)
        calls = ([t if axis is None else t.select(axis, i) for t, axis in pairs]
                 for i in range(size))
        return torch.stack([f(*call) for call in calls], out)
    return loop


def _our_jvp(f):
    def derivative(*a):
        half = len(a) // 2
        return mx.jvp(f, list(a[:half]), list(a[half:]))[1][0]
    return derivative


def _their_jvp(f):
    "The sum of the changes with each argument, in which `f` is linear but for a constant."
    def derivative(*a):
        primals, tangents = a[: len(a) // 2], a[len(a) // 2 :]
        def put(i, t): return f(*primals[:i], t, *primals[i + 1 :])
        return sum(put(i, t) - put(i, torch.zeros_like(t)) for i, t in enumerate(tangents))
    return derivative


# How it is run -------------------------------------------------------------------------------

@contextmanager
def _watched():
    "A list of every run of an algorithm."
    token = choice.watchers.set((seen := [],))
    try: yield seen
    finally: choice.watchers.reset(token)


@contextmanager
def _tiles_of(size):
    "Work is divided into parts of so many bytes, as it is for arrays of many megabytes."
    with ExitStack() as stack:
        if size is not None:
            stack.enter_context(patch.object(tiles, "WHOLE", size))
            for module in (tiles, fft, overlap, weights):
                stack.enter_context(patch.object(module, "tile_bytes", lambda g: max(1, size // 4)))
        yield


def _forced(case, ours):
    "The algorithm of the case, or none if it is not defined for one of the calls."
    name = case.get("algorithm")
    if name is None: return nullcontext()
    with fc.algorithm(name):
        made = [_outcome(ours, *(mx.zeros(*of) for of in _examples(c))) for c in _shapes(case)]
    undefined = any("is not defined for this call" in str(e) for e in made if type(e) is ValueError)
    return nullcontext() if undefined else fc.algorithm(name)
