"""The convolution as one of MLX's operations, computed by the kernels"""
import os
import sys
import warnings
from ctypes import CDLL, c_void_p
from functools import lru_cache
from threading import Lock
from typing import NamedTuple

from ..blas import _in_use

_glue = None  # the module, once it is loaded
call = None  # its `convolve`, while convolutions run in kernels
_files = ()  # the libraries, then
_reason = "no convolution has asked for them yet"
_is_settled = False
_settling = Lock()


def available() -> bool:
    """Whether convolutions on the CPU run in kernels, which the first call compiles if need be.

    `FLASHCONV_KERNELS=off` says no. Without a compiler, a warning says what is missing;
    `FLASHCONV_KERNELS=require` makes that a `RuntimeError`. `ValueError` for other values.
    """
    if not _is_settled:
        with _settling:
            if not _is_settled: _settle()
    return call is not None


def use(
    wanted: bool,  # whether convolutions on the CPU are to run in kernels
) -> None:
    """Turn the kernels off or on, for all threads, from the next call on.

    Raises `TypeError` for anything but a bool, `RuntimeError` if there are none to turn on.
    """
    global call
    if not isinstance(wanted, bool): raise TypeError(f"wanted must be a bool, but got {wanted!r}")
    available()
    if wanted and _glue is None: raise RuntimeError(f"there are no kernels: {_reason}")
    call = _glue.convolve if wanted else None


def _settle():
    "Load the kernels or find out why there are none, once and for all."
    global _glue, _reason, _is_settled
    wish = os.environ.get("FLASHCONV_KERNELS", "")
    if wish not in ("", "off", "require"):
        raise ValueError(f"FLASHCONV_KERNELS must be 'off' or 'require', but got {wish!r}")
    if wish == "off": _reason = "FLASHCONV_KERNELS=off"
    elif sys.platform != "linux": _reason = "they are built on Linux only"
    else: _try(wish)
    if wish == "require" and _glue is None: raise RuntimeError(f"FLASHCONV_KERNELS=require: {_reason}")
    _is_settled = True


def _try(wish):
    "Load the kernels, compiled first if they have to be."
    global _glue, _files, _reason, call
    from .build import BuildError, libraries, load  # not before a convolution wants them
    from .pool import threads
    count = threads()  # before anything is compiled, a wrong number is refused
    try:
        files = libraries()
        module = load(*files)
    except (BuildError, ImportError, OSError) as error:
        _reason = str(error)
        if not wish: warnings.warn(_ADVICE.format(_reason), RuntimeWarning, stacklevel=4)
        return
    module.set_threads(count)
    _glue, _files, _reason = module, tuple(map(str, files)), "compiled for this machine"
    call = module.convolve
    lend_threads(_in_use())


_ADVICE = (
    "flashconv works without its kernels, so convolutions on the CPU are several times slower: {}. "
    "`python -m flashconv build` tries again, FLASHCONV_KERNELS=off silences this.")


def lend_threads(
    library: str | None,  # the BLAS in use, a file
) -> bool:  # whether it takes them: OpenBLAS does
    """Have a BLAS work on the kernels' threads, and on no more of them than there are.

    Its own would go on looking for work for a while, on processors that the next convolution needs.
    """
    loaded = CDLL(library) if library and _glue else None
    for prefix in ("scipy_openblas", "openblas"):
        if not hasattr(loaded, f"{prefix}_set_threads_callback_function"): continue
        count = min(loaded[f"{prefix}_get_num_threads"](), _glue.threads())
        loaded[f"{prefix}_set_num_threads"](count)
        loaded[f"{prefix}_set_threads_callback_function"](c_void_p(_glue.blas_callback()))
        return True
    return False


@lru_cache(maxsize=4096)
def spec(
    stride: tuple,  # step per axis
    padding: tuple,  # zeros (before, after) per axis
    dilation: tuple,  # distance between taps per axis
    groups: int = 1,  # blocks of channels that don't see each other
    channels_last: bool = False,  # whether the arrays are (N, *spatial, C)
    output_padding: tuple | None = None,  # added at the end per axis; makes it transposed
):
    """What a layer fixes, whatever the sizes of its input: call it with (x, weight, bias, stream).

    Without a bias or a stream that is None. It has the derivatives of sum(y * conv(x, w)) as
    methods: `input_gradient(w, y, shape)`, `weight_gradient(x, y, shape)`, `bias_gradient(y)`.
    They take float32, float16 and bfloat16. Raises `ValueError` for what does not fit.
    """
    return _glue.Spec(stride, padding, dilation, groups, channels_last, output_padding)


class Info(NamedTuple):
    "What convolutions on the CPU run in."
    kernels: bool  # whether in kernels
    reason: str  # why they do, or why not
    threads: int | None  # that the kernels work on
    files: tuple  # the libraries

    def __repr__(self):
        if not self.kernels: return f"no kernels: {self.reason}"
        plural = "" if self.threads == 1 else "s"
        return f"kernels, {self.threads} thread{plural} ({self.reason}): {', '.join(self.files)}"


def info() -> Info:
    "What convolutions on the CPU run in and why, without building anything."
    return Info(_glue is not None, _reason, _glue and _glue.threads(), _files)
