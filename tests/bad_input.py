"""Every argument of every public function and layer, replaced in turn by nonsense.

`python tests/bad_input.py GROUP` runs the subjects of one group in this process and prints a line
of JSON for each: how many cases ran, what they accepted, and everything that broke a rule. With
`SUBJECT [ARGUMENT [VALUE]]` behind it, only these, with the message of each. The arguments come
from the signatures; a subject needs one call that works, no more.

A call works, as in PyTorch where PyTorch has it, or it is a TypeError, ValueError or RuntimeError
that names the argument. It takes less than `SECONDS` and `BYTES`, and leaves a layer as it was.
"""
import collections
import contextlib
import faulthandler
import functools
import importlib
import inspect
import io
import json
import os
import re
import sys
import tempfile
import time
import types
import warnings
import zlib
from functools import partial

import mlx.core as mx
import mlx.nn
import mlx.utils
import numpy as np

import flashconv
import flashconv.arguments
import flashconv.arithmetic
from flashconv.lazy import UninitializedParameter

try: import torch
except ImportError: torch = None

SECONDS, BYTES = 10, 4 * 2**30
ALLOWED = TypeError, ValueError, RuntimeError


class Library:
    "What a call is made of, in flashconv and in PyTorch."

    def __init__(self, nn, F, array, array_type):
        self.nn, self.F, self.array, self.array_type = nn, F, array, array_type

    def ones(self, *shape): return self.array(np.ones(shape, np.float32))


OURS = Library(flashconv, flashconv.functional, mx.array, mx.array)
THEIRS = torch and Library(torch.nn, torch.nn.functional, torch.tensor, torch.Tensor)

# Values: each is made anew for each case, by the library that is called ----------------------

VALUES = {
    "None": lambda L: None,
    "a string": lambda L: "nonsense",
    "an empty string": lambda L: "",
    "bytes": lambda L: bytes((2,)),
    "1.5": lambda L: 1.5,
    "2.0": lambda L: 2.0,
    "nan": lambda L: float("nan"),
    "inf": lambda L: float("inf"),
    "1j": lambda L: 1j,
    "-1": lambda L: -1,
    "0": lambda L: 0,
    "2**31": lambda L: 2**31,
    "2**63": lambda L: 2**63,
    "-2**63": lambda L: -(2**63),
    "10**30": lambda L: 10**30,
    "True": lambda L: True,
    "False": lambda L: False,
    "()": lambda L: (),
    "7 ones": lambda L: (1,) * 7,
    "(0,)": lambda L: (0,),
    "(-1,)": lambda L: (-1,),
    "(None,)": lambda L: (None,),
    "('x',)": lambda L: ("x",),
    "(1.5,)": lambda L: (1.5,),
    "((1,),)": lambda L: ((1,),),
    "(2**63,)": lambda L: (2**63,),
    "[]": lambda L: [],
    "[1]": lambda L: [1],
    "[[1.0]]": lambda L: [[1.0]],
    "a dict": lambda L: {"weight": 1},
    "an empty dict": lambda L: {},
    "a set": lambda L: {1},
    "a range": lambda L: range(1, 2),
    "a generator": lambda L: (i for i in (1,)),
    "an object": lambda L: object(),
    "a type": lambda L: int,
    "a function": lambda L: lambda *a, **k: None,
    "np.int64(1)": lambda L: np.int64(1),
    "np.float64(1)": lambda L: np.float64(1),
    "np.bool_": lambda L: np.True_,
    "a NumPy array": lambda L: np.ones((1, 2, 8, 8), np.float32),
    "NumPy ints": lambda L: np.array([1, 1]),
    "0-d NumPy": lambda L: np.array(1),
    "an array": lambda L: L.ones(2, 3),
    "an empty array": lambda L: L.ones(0),
    "a 0-d array": lambda L: L.array(1.0),
    "a 0-d int array": lambda L: L.array(1),
    "an array of ints": lambda L: L.array([1, 1]),
    "a foreign array": lambda L: np.ones((2, 3)) if torch is None or L is THEIRS
                       else torch.ones(2, 3),
    "a dtype": lambda L: mx.int32 if L is OURS else torch.int32,
    "a NumPy dtype": lambda L: np.float32,
    "a layer": lambda L: L.nn.Conv1d(2, 2, 3),
}


def near(value, L):
    "Values that are almost the one that works, by name."
    if isinstance(value, L.array_type):
        to = (lambda a, name: a.astype(getattr(mx, name)) if L is OURS
              else a.to(getattr(torch, {"bool_": "bool"}.get(name, name))))
        for name in ("float16", "int32", "bool_", "complex64"):
            yield f"its {name}", partial(to, value, name)
        yield "one axis more", lambda: value[None]
        yield "two axes more", lambda: value[None, None]
        yield "one axis less", lambda: value[0]
        yield "an empty one", lambda: value[:0]
        yield "empty in its last axis", lambda: value[..., :0]
        yield "all of one size", lambda: L.ones(*([1] * value.ndim))
        yield "its NumPy array", lambda: np.array(value if L is OURS else value.detach())
        yield "its list", lambda: value.tolist()
        yield "in a tuple", lambda: (value,)
        yield "in a list", lambda: [value]
        yield "waiting", lambda: (UninitializedParameter() if L is OURS
                                  else torch.nn.UninitializedParameter())
    elif isinstance(value, tuple) and value:
        for name, of in (("as a list", list), ("one more", lambda v: v + v[:1]),
                         ("one less", lambda v: v[:-1]), ("as an array", L.array),
                         ("as NumPy", np.array), ("as strings", lambda v: tuple(map(str, v))),
                         ("as floats", lambda v: tuple(map(float, v))),
                         ("as bools", lambda v: tuple(map(bool, v))),
                         ("as NumPy ints", lambda v: tuple(map(np.int64, v))),
                         ("as arrays", lambda v: tuple(map(L.array, v))),
                         ("with None", lambda v: v[:-1] + (None,)),
                         ("with -1", lambda v: v[:-1] + (-1,)),
                         ("with 0", lambda v: v[:-1] + (0,)),
                         ("with 10**30", lambda v: v[:-1] + (10**30,)),
                         ("as a dict", lambda v: dict.fromkeys(v))):
            yield name, (lambda of=of: of(value) if all(map(_is_int, value)) else of)


def _is_int(value): return isinstance(value, int)


# Subjects: name -> (what to call, arguments that work, what must not change), of a library --------

SUBJECTS = collections.defaultdict(dict)  # group -> name -> function of a library
ALONE = set()  # what PyTorch has not


def subject(group, name, alone=True):
    "Have a function of a library, which gives (call, arguments, layer or None), run as `name`."
    def keep(make):
        SUBJECTS[group][name] = make
        if alone: ALONE.add(name)
        return make
    return keep


def _sizes(n): return (8, 7, 6)[:n]

def _functional(name, n, transposed, L):
    arguments = dict(input=L.ones(1, 4, *_sizes(n)), weight=L.ones(4, 2, *(3, 2, 3)[:n]),
                     bias=L.ones(4), stride=(2, 1, 2)[:n], padding=(1,) * n)
    if transposed: arguments |= dict(output_padding=(1, 0, 1)[:n])
    return getattr(L.F, name), arguments | dict(groups=2, dilation=(1,) * n), None


def _constructor(name, n, transposed, L):
    "Construction and the first call in one: PyTorch leaves some of the checks to the call."
    def make_and_call(**arguments):
        layer = getattr(L.nn, name)(**arguments)
        dtype = arguments.get("dtype")
        x = L.ones(1, 4, *_sizes(n))
        if arguments.get("data_format") == "channels_last": x = mx.moveaxis(x, 1, -1)
        if isinstance(dtype, mx.Dtype): x = x.astype(dtype)
        elif torch and isinstance(dtype, torch.dtype): x = x.to(dtype)
        return layer(x)
    arguments = dict(in_channels=4, out_channels=4, kernel_size=(3, 2, 3)[:n],
                     stride=(2, 1, 2)[:n], padding=(1,) * n, dilation=(1,) * n, groups=2,
                     bias=True, padding_mode="zeros")
    if name.startswith("Lazy"): del arguments["in_channels"]
    if transposed: arguments["output_padding"] = (1, 0, 1)[:n]
    make_and_call.__signature__ = inspect.signature(getattr(flashconv, name))
    return make_and_call, arguments, None


def _layer(name, n, L):
    lazy = () if name.startswith("Lazy") else (4,)
    return getattr(L.nn, name)(*lazy, 4, (3, 2, 3)[:n], (2, 1, 2)[:n], (1,) * n, groups=2)


def _call(name, n, L):
    layer = _layer(name, n, L)
    arguments = dict(input=L.ones(1, 4, *_sizes(n)))
    if "Transpose" in name and not name.startswith("Lazy"):
        arguments["output_size"] = tuple((i - 1) * s - 2 + k for i, s, k in
                                         zip(_sizes(n), (2, 1, 2), (3, 2, 3)))
    return layer, arguments, layer


ATTRIBUTES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
              "groups", "padding_mode", "output_padding", "weight", "bias", "data_format",
              "device", "transposed")

def _attributes(name, n, mode, L):
    "Attributes of a layer, changed between its construction and a call."
    layer = _layer(name, n, L)
    layer.padding_mode = mode
    if hasattr(layer, "_reversed_padding_repeated_twice") and L is THEIRS:
        layer._reversed_padding_repeated_twice = [1] * 2 * n
    def change_and_call(**attributes):
        for attribute, value in attributes.items():
            if isinstance(value, torch.Tensor if torch else ()) and L is THEIRS:
                if attribute in ("weight", "bias"):
                    value = torch.nn.Parameter(value, value.is_floating_point())
            setattr(layer, attribute, value)
        return layer(L.ones(1, 4, *_sizes(n)))
    change_and_call.__signature__ = inspect.Signature(
        [inspect.Parameter(a, inspect.Parameter.KEYWORD_ONLY) for a in ATTRIBUTES])
    return change_and_call, {a: getattr(layer, a) for a in ATTRIBUTES if hasattr(layer, a)}, None


for n in (1, 2, 3):
    for transposed, name in ((False, f"conv{n}d"), (True, f"conv_transpose{n}d")):
        subject("functions", f"functional.{name}", False)(partial(_functional, name, n, transposed))
    for lazy in ("", "Lazy"):
        for transposed, kind in ((False, "Conv"), (True, "ConvTranspose")):
            name = f"{lazy}{kind}{n}d"
            subject(kind, name, False)(partial(_constructor, name, n, transposed))
            subject(kind, f"{name}.__call__", False)(partial(_call, name, n))
            if not lazy: subject(kind, f"{name} (changed)", False)(
                partial(_attributes, name, n, "zeros"))
subject("Conv", "Conv2d (changed, circular)")(partial(_attributes, "Conv2d", 2, "circular"))


@subject("functions", "functional.pad", False)
def _(L):
    return L.F.pad, dict(input=L.ones(1, 2, 6), pad=(1, 2), mode="constant", value=0.5), None


# What PyTorch has not --------------------------------------------------------------------------

def alone(group, name, /, **arguments):
    "A public function and a call that works; arguments that are functions are made anew."
    module, _, function = name.rpartition(".")
    call = getattr(importlib.import_module(f"flashconv.{module}".rstrip(".")), function)
    def make(L):
        made = {k: v() if isinstance(v, types.FunctionType) and k not in ("call", "plot") else v
                for k, v in arguments.items()}
        return call, made, None
    return subject(group, name)(make)


def _conv1d(): return flashconv.Conv1d(2, 4, 3, padding=1)


alone("others", "arithmetic.effective_kernel_size", kernel_size=(3, 3), dilation=2)
alone("others", "arithmetic.output_size", input_size=(8, 9), kernel_size=3, stride=2, padding=1,
      dilation=1)
alone("others", "arithmetic.transposed_output_size", input_size=(8, 9), kernel_size=3, stride=2,
      padding=1, output_padding=1, dilation=1)
alone("others", "arithmetic.output_padding_for", output_size=(16, 16), input_size=8, kernel_size=3,
      stride=2, padding=1, dilation=1)
alone("others", "arithmetic.same_padding", kernel_size=(3, 4), dilation=2)
alone("others", "arithmetic.same_upper_padding", input_size=(8, 9), kernel_size=3, stride=2,
      dilation=1)
alone("others", "arguments.is_channels_last", data_format="channels_last")
@functools.cache
def _exported():
    "A network made of its exported program, once."
    return flashconv.convert_model(torch.nn.Conv1d(2, 4, 3), (torch.zeros(1, 2, 8),))


alone("others", "dilation.insert_zeros", x=lambda: mx.ones((2, 3)), steps={1: 2})
alone("others", "dilation.coverage", kernel_sizes=[3, 3], dilations=[1, 2])
alone("others", "blas.gflops", n=8)
alone("others", "blas.use", library="off")
alone("others", "explain", call=_conv1d(), input_shape=(1, 2, 8), dtype=mx.float32)
alone("others", "tune", call=_conv1d(), input_shape=(1, 2, 8), dtype=mx.float32)
alone("others", "lazy.UninitializedParameter", dtype=mx.float32)
if torch:
    alone("others", "from_torch", layer=lambda: torch.nn.Conv1d(2, 4, 3),
          data_format="channels_last")
    alone("others", "to_torch", layer=_conv1d)
    alone("others", "to_torch_state", model=_conv1d)
    for name in ("convert_model", "conversion_report"):
        alone("others", name, model=lambda: torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3)),
              data_format="channels_last", modules=None)
    alone("others", "source", model=lambda: _exported())
alone("others", "from_mlx", layer=lambda: mlx.nn.Conv1d(2, 4, 3))
alone("others", "to_mlx", layer=_conv1d)
alone("others", "load_torch_state", model=_conv1d, source=lambda: dict(_conv1d().state_dict()))
alone("others", "load_mlx_weights", model=_conv1d,
      source=lambda: dict(flashconv.to_mlx(_conv1d()).parameters()))
alone("others", "save_torch_state", model=_conv1d,
      file=lambda: os.path.join(tempfile.mkdtemp(), "state.safetensors"))
def _normed(kind): return lambda: getattr(flashconv, f"{kind}_norm")(_conv1d())

alone("others", "weight_norm", module=_conv1d, name="weight")
alone("others", "spectral_norm", module=_conv1d, name="weight", n_power_iterations=1, eps=1e-12)
for kind in ("weight", "spectral"):
    alone("others", f"remove_{kind}_norm", module=_normed(kind), name="weight")
alone("others", "fold_weight_norm", model=_normed("weight"))
alone("others", "fold_batch_norm", model=lambda: mlx.nn.Sequential(_conv1d()), inplace=False)
alone("others", "folding_report", model=lambda: mlx.nn.Sequential(_conv1d()))
alone("others", "functional.unfold", input=lambda: mx.ones((1, 2, 6, 6)), kernel_size=2, dilation=1,
      padding=0, stride=1, data_format="channels_first")
alone("others", "functional.fold", input=lambda: mx.ones((1, 8, 25)), output_size=6, kernel_size=2,
      dilation=1, padding=0, stride=1, data_format="channels_first")
alone("others", "Unfold", kernel_size=2, dilation=1, padding=0, stride=1,
      data_format="channels_first")
alone("others", "Fold", output_size=6, kernel_size=2, dilation=1, padding=0, stride=1,
      data_format="channels_first")
for name in ("upgrade", "downgrade"):
    alone("others", name, model=lambda: mlx.nn.Sequential(mlx.nn.Conv1d(2, 4, 3)))
_DRAWS = {"uniform": {"a": 0.0, "b": 1.0}, "normal": {"mean": 0.0, "std": 1.0},
          "trunc_normal": {"mean": 0.0, "std": 1.0, "a": -2.0, "b": 2.0},
          "xavier_uniform": {"gain": 1.0}, "xavier_normal": {"gain": 1.0},
          "orthogonal": {"gain": 1.0},
          **{f"kaiming_{kind}": {"a": 0.1, "mode": "fan_in", "nonlinearity": "leaky_relu"}
             for kind in ("uniform", "normal")}}
for end in ("", "_"):
    for name, arguments in _DRAWS.items():
        alone("init", f"init.{name}{end}", tensor=lambda: mx.ones((4, 2, 3)), **arguments,
              generator=lambda: mx.random.key(0))
    for name in ("zeros", "ones"): alone("init", f"init.{name}{end}", tensor=lambda: mx.ones(3))
    alone("init", f"init.constant{end}", tensor=lambda: mx.ones((4, 2, 3)), val=0.5)
    alone("init", f"init.dirac{end}", tensor=lambda: mx.ones((4, 2, 3)), groups=2)
alone("init", "init.calculate_gain", nonlinearity="leaky_relu", param=0.2)
alone("draw", "draw.window", layer_or_kernel_size=3, size=6, stride=1, padding=1, dilation=1,
      output_padding=0, transposed=False, step=None, input=None)
alone("draw", "draw.frames", layer_or_kernel_size=3, size=6, steps=(0, 1))
alone("draw", "draw.animation", layer_or_kernel_size=3, size=4, seconds=0.5)
alone("draw", "draw.matrix", layer_or_kernel=3, size=5)
alone("draw", "draw.padding_modes", values=[1, 2, 3], padding=(1, 2))
alone("draw", "draw.receptive_field", layers=[(3, 1, 1, 1)], axis=0)
alone("draw", "draw.dilation_taps", kernel_size=3, dilations=(1, 2), stacked=False)
alone("draw", "draw.groups", in_channels=4, out_channels=4, groups=2)
alone("draw", "draw.overlap", layer_or_kernel_size=3, stride=1, size=4, padding=0, dilation=1,
      output_padding=0)
alone("draw", "draw.output_sizes", layer_or_kernel_size=3, stride=2, padding=0, dilation=1,
      outputs=(3, 4))
alone("draw", "draw.feature_maps", layer_or_output=_conv1d(), x=lambda: mx.ones((2, 6)), most=4)
alone("draw", "draw.kernels", layer=_conv1d, most=4)
alone("draw", "draw.cells", blocks={"a": [1, 2]}, roles={"a": "tap"}, alt="two cells", caption="")
alone("draw", "draw.figure", plot=lambda ax: ax.plot([1, 2]), width=3, height=2, alt="a line",
      caption="", rows=1, columns=1, numbers=None)


@subject("others", "algorithm")
def _(L):
    def call(name):
        with flashconv.algorithm(name): return _conv1d()(mx.ones((1, 2, 8)))
    return call, dict(name="taps"), None

@subject("others", "arithmetic.receptive_field")
def _(L):
    def call(layer, axis): return flashconv.arithmetic.receptive_field(layer, axis=axis)
    return call, dict(layer=_conv1d(), axis=0), None

@subject("others", "arithmetic.receptive_field (attributes)")
def _(L):
    def call(kernel_size, stride, padding, dilation):
        layer = types.SimpleNamespace(kernel_size=kernel_size, stride=stride, padding=padding,
                                      dilation=dilation)
        return flashconv.arithmetic.receptive_field(layer)
    return call, dict(kernel_size=3, stride=1, padding=0, dilation=1), None

@subject("others", "materialize")
def _(L):
    model = mlx.nn.Sequential(flashconv.LazyConv1d(4, 3))
    def call(model, input): return flashconv.materialize(model, input)
    return call, dict(model=model, input=mx.ones((1, 2, 8))), model.layers[0]


@subject("others", "allow_fft")
def _(L):
    def in_block(allowed):
        with flashconv.allow_fft(allowed): return _conv1d()(mx.ones((1, 2, 8)))
    return in_block, {"allowed": True}, None


alone("others", "allow_fft_everywhere", allowed=False)


def _method(kind, name, arguments):
    def make(L):
        layer = getattr(flashconv, kind)(*(() if kind.startswith("Lazy") else (2,)), 4, 3)
        return getattr(layer, name), arguments(layer), layer
    return subject("others", f"{kind}.{name}")(make)

def _state(_): return {"weight": mx.ones((4, 2, 3)), "bias": mx.ones(4)}

for kind in ("Conv1d", "LazyConv1d"):
    _method(kind, "state_dict", lambda layer: dict(prefix="a."))
    _method(kind, "load_state_dict", lambda layer: dict(state_dict=_state(layer), strict=True,
                                                        assign=False))
_method("LazyConv1d", "load_weights",
        lambda layer: dict(file_or_weights=list(_state(layer).items()), strict=True))
_method("LazyConv1d", "initialize_parameters", lambda layer: dict(input=mx.ones((1, 2, 8))))
_method("Conv1d", "_conv_forward", lambda layer: dict(input=mx.ones((1, 2, 8)), weight=layer.weight,
                                                      bias=layer.bias))

@subject("others", "_ConvNd")
def _(L):
    return flashconv._ConvNd, dict(
        in_channels=4, out_channels=4, kernel_size=(3,), stride=(1,), padding=(0,), dilation=(1,),
        transposed=False, output_padding=(0,), groups=1, bias=True, padding_mode="zeros"), None

@subject("others", "_ConvTransposeNd")
def _(L):
    return flashconv._ConvTransposeNd, dict(
        in_channels=4, out_channels=4, kernel_size=(3,), stride=(1,), padding=(0,), dilation=(1,),
        transposed=True, output_padding=(0,), groups=1, bias=True, padding_mode="zeros"), None


WHOLE = float(os.environ.get("FLASHCONV_EXAMPLES", 1)) > 1  # or the part for the ordinary run
EVERY = {"others": 1, "draw": 8}  # of so many cases one; of the layers one in 3 for each rank

def main(group, only=()):
    import resource
    if mx.default_device() == mx.cpu:
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + BYTES,) * 2)
    warnings.simplefilter("ignore")
    if torch: torch.set_num_threads(1)
    for name in SUBJECTS[group]:
        if only and name != only[0]: continue
        every = 1 if WHOLE else EVERY.get(group, 3)
        print(json.dumps(run(name, SUBJECTS[group][name], only, every)), flush=True)


def _address_space():
    "Bytes of addresses that the process has already."
    with contextlib.suppress(OSError):
        with open("/proc/self/statm") as file: return int(file.read().split()[0]) * 4096
    return 0


# Cases and their judgement ------------------------------------------------------------------------

def run(name, make, only=(), every=1):
    "All cases of a subject, or of every so many; the same of 1d, 2d and 3d make up the whole."
    call, arguments, _ = make(OURS)
    evaluate(call(**arguments))  # the call that works
    if THEIRS and name not in ALONE:
        theirs, given, _ = make(THEIRS)
        theirs(**given)
    parameters = inspect.signature(call).parameters
    armed, rank = 0, int((re.findall(r"(\d)d", name) or [0])[0])
    found = dict(subject=name, cases=0, accepted={}, broken=[])
    if hasattr(call, "__delwrap__"):  # what it hands on is seen to there
        parameters = call.__code__.co_varnames[: call.__code__.co_argcount
                                               + call.__code__.co_kwonlyargcount]
    for argument in parameters:
        if argument in ("args", "kwargs", "self"): continue
        valid = arguments.get(argument)
        for value in [*VALUES, *(label for label, _ in near(valid, OURS))]:
            if name in ALONE and isinstance(valid, bool) and value not in FLAGS: continue
            turn = zlib.crc32(f"{argument} {value}".encode()) + rank
            if turn % every and not only: continue
            if only[1:] and argument != only[1] or only[2:] and value != only[2]: continue
            found["cases"] += 1
            print(f"{name} {argument}={value}", file=sys.stderr, flush=True)
            start = time.perf_counter()
            if start > armed + 1:
                armed = start
                faulthandler.dump_traceback_later(SECONDS, exit=True)
            wrong, accepted, message = judge(name, make, argument, value)
            print(f"{time.perf_counter() - start:.3f} s", file=sys.stderr)
            if accepted: found["accepted"].setdefault(argument, []).append(value)
            for why in wrong: found["broken"].append(f"{argument}={value}: {why}")
            if only[1:]: print(argument, value, message)
    faulthandler.cancel_dump_traceback_later()
    return found


def attempt(L, make, argument, label):
    "The outcome of one case: a result or None, an error or None, whether the layer changed."
    call, arguments, layer = make(L)
    try:
        value = (VALUES[label](L) if label in VALUES
                 else dict(near(arguments[argument], L))[label]())
    except Exception: return None, None, False  # there is no such value here
    before = None if layer is None else snapshot(layer)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return evaluate(call(**arguments | {argument: value})), None, False
    except Exception as error:
        return None, error, before is not None and snapshot(layer) != before


def evaluate(result):
    arrays = [a for _, a in mlx.utils.tree_flatten(result)
              if type(a) is mx.array] if isinstance(result, (mx.array, tuple, list, dict)) else []
    mx.eval(arrays)
    return result


def snapshot(layer):
    "Everything that a layer is, as text."
    if torch and isinstance(layer, torch.nn.Module): return None
    values = {k: v if type(v) is not mx.array else np.array(v).tobytes()
              for k, v in dict.items(layer)}
    return repr((type(layer), values, vars(layer)))


def judge(name, make, argument, label):
    "What breaks a rule, whether the value was accepted, and what was said."
    result, error, changed = attempt(OURS, make, argument, label)
    wrong = ["the layer has changed"] if changed else []
    if error is not None:
        said = f"{type(error).__name__}: {error}"
        is_axis = isinstance(error, IndexError) and argument == "dim"  # as PyTorch raises it
        if not isinstance(error, ALLOWED) and not is_axis or isinstance(error, RecursionError):
            wrong.append(f"raises {said}")
        elif not names(argument, str(error)): wrong.append(f"does not name it: {said}")
    else: said = "accepted"
    if (error is None and name in ALONE and label in NEVER
            and not anything_goes(name, argument, label)):
        wrong.append("accepted")
    if THEIRS and name not in ALONE and argument not in OUR_OWN:
        wrong += compare(result, error, said, *attempt(THEIRS, make, argument, label)[:2],
                         DIFFERENT.get((argument, label)))
    return wrong, error is None, said


def compare(result, error, said, theirs, refused, known):
    "Where PyTorch decides otherwise, or refuses by another type of error."
    if known or "please report a bug" in str(refused) or isinstance(refused, AssertionError): return
    if refused is None and error is None:
        if result.shape != tuple(theirs.shape):
            yield f"gives {result.shape}, PyTorch {tuple(theirs.shape)}"
    elif refused is None: yield f"PyTorch accepts it, but here {said}"
    elif error is None: yield f"accepted, where PyTorch raises {type(refused).__name__}: {refused}"
    elif (isinstance(refused, ALLOWED) and not isinstance(error, type(refused))
          and not isinstance(error, TypeError) and not re.search(INCIDENTAL, str(refused))):
        yield f"PyTorch raises {type(refused).__name__}: {refused}, but here {said}"


INCIDENTAL = "unpack|ambiguous|unhashable|getset_descriptor"  # PyTorch's errors by chance

NEVER = ("a dict", "a set", "an object", "a generator", "a type", "1j", "nan", "inf", "a dtype",
         "(None,)", "('x',)", "[[1.0]]", "((1,),)")  # neither a number, nor an array, nor a name

def anything_goes(name, argument, label):
    "Flags, what the base classes leave to the call, as PyTorch's do, and values that are right."
    return (name.startswith("_Conv") or "changed" in name
            or argument in ("strict", "assign", "stacked", "transposed", "bias")
            or (argument, label) in {("dtype", "a dtype"), ("input", "[[1.0]]"), ("input", "((1,),)"),
                                     ("layer_or_kernel_size", "[[1.0]]"), ("layers", "((1,),)"),
                                     ("layer_or_kernel", "[[1.0]]"), ("numbers", "a dict"),
                                     ("val", "nan"), ("val", "inf"), ("b", "inf")})

FLAGS = "None", "a string", "2.0", "()", "an array", "a NumPy array", "an object"  # enough there

OUR_OWN = "device", "dtype", "data_format"  # MLX's, not PyTorch's, or not there

DIFFERENT = {  # what PyTorch decides otherwise, and why it is not followed
    ("padding", "bytes"): "PyTorch takes bytes for a string",
    **{("value", v): "a number is asked for" for v in
       ("a 0-d array", "a 0-d int array", "np.bool_")},
    **{("input", v): "that the dtypes differ is said first" for v in ("its int32", "its bool_")},
    **{(a, "as an array"): "PyTorch takes an array of one int for an int" for a in
       ("stride", "padding", "dilation", "output_padding", "kernel_size")},
    **{(a, v): "an int in an array is an int, as in PyTorch's functions" for a in
       ("stride", "padding", "dilation", "output_padding", "kernel_size")
       for v in ("0-d NumPy", "a 0-d int array")},
    **{("kernel_size", v): "no bools, as for the stride" for v in ("True", "as bools")},
    **{("input", f"{n} more"): "the rank is said first" for n in ("one axis", "two axes")},
    **{(a, "waiting"): "the shape is asked for first" for a in ("input", "weight", "bias")},
}

PHRASES = {  # how else a message names an argument: in PyTorch's words, or by what it does
    "pad": "padding", "padding": "output size|kernel size", "groups": "weight of size",
    "weight": "kernel size", "dilation": "kernel size", "dilations": "dilation",
    "in_channels": "weight of size|channels|negative dimension",
    "out_channels": "weight of size|negative dimension", "padding_mode": "mode",
    "kernel_size": "padding|weight of size|kernel size|negative dimension",
    "kernel_sizes": "kernel size", "layer_or_kernel_size": "kernel size|a transposed layer",
    "layer_or_kernel": "kernel size", "layers": "kernel size|layer",
    "values": "input dimension|dimensions for input",
    "input": "in channels", "input_shape": "input|channels", "size": "input", "dtype": "input type",
    "x": "input|channels|output", "plot": "axes", "steps": "step", "call": "input type",
    "layer_or_output": "output", "tensor": "not implemented for|tensors with|dim 0 must be",
    "param": "negative slope",
}
ANY = (  # what is said about several arguments at once
    "beyond what mlx can index", "uninitialized parameter", "axis must be", "possible here",
    "loading state dict", "valid sizes range from", "steps must take axes", "spatial axes",
    "ambiguous", "must span", "one dilation per layer", "padded input size",
    "gives an output size", "algorithm is called", "only length 1 arrays", "to be drawn",
    "inches at most")

def names(argument, message):
    "Whether a message names an argument, with spaces for underscores or in PyTorch's words."
    words = re.sub("[^a-z0-9]+", " ", message.lower())
    allowed = [argument.replace("_", " "), *PHRASES.get(argument, "").split("|"), *ANY]
    return bool(re.search(rf"\b({'|'.join(filter(None, allowed))})\b", words))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
