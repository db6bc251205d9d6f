"""PyTorch's convolution layers for Apple's MLX."""

__version__ = "0.1.0"

import os

from flashconv import blas, distributed, functional, init, kernels, memory, streaming
from flashconv.algorithms.choice import algorithm, allow_fft, allow_fft_everywhere
from flashconv.algorithms.explain import explain, tune
from flashconv.base import _ConvNd
from flashconv.conv import Conv1d, Conv2d, Conv3d
from flashconv.convert import (
    conversion_report, convert_model, downgrade, from_mlx, from_torch, load_mlx_weights,
    load_torch_state, save_torch_state, to_mlx, to_torch, to_torch_state, upgrade)
from flashconv.folding import fold_batch_norm, folding_report
from flashconv.lazy import (
    LazyConv1d, LazyConv2d, LazyConv3d, LazyConvTranspose1d, LazyConvTranspose2d,
    LazyConvTranspose3d, materialize)
from flashconv.parametrizations import (
    fold_weight_norm, remove_spectral_norm, remove_weight_norm, spectral_norm, weight_norm)
from flashconv.plain import plain_operations
from flashconv.transposed import (
    ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, _ConvTransposeNd)
from flashconv.unfold import Fold, Unfold

# What the import does to the process; a library that has flashconv inside can set "off".
_effects = os.environ.get("FLASHCONV_EFFECTS") or "on"
if _effects not in ("on", "off"):
    raise ValueError(f"FLASHCONV_EFFECTS must be on or off, but is {_effects!r}")
if _effects == "on":
    blas.load()  # a fast one, on Linux CPUs, whether or not MLX was imported before
    memory.raise_cache_limit()  # on CPUs too

__all__ = [
    "blas", "distributed", "functional", "init", "kernels", "streaming", "Conv1d", "Conv2d",
    "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "LazyConv1d", "LazyConv2d",
    "LazyConv3d", "LazyConvTranspose1d", "LazyConvTranspose2d", "LazyConvTranspose3d",
    "materialize", "Unfold", "Fold", "weight_norm", "remove_weight_norm", "fold_weight_norm",
    "spectral_norm", "remove_spectral_norm", "fold_batch_norm", "folding_report", "from_torch",
    "to_torch", "from_mlx", "to_mlx", "load_mlx_weights", "load_torch_state", "save_torch_state",
    "to_torch_state", "convert_model", "conversion_report", "source", "upgrade", "downgrade",
    "algorithm", "allow_fft", "allow_fft_everywhere", "explain", "tune", "plain_operations",
    "_ConvNd", "_ConvTransposeNd"]


def __getattr__(name):
    "As `flashconv.convert` does: `source` is loaded when it is asked for."
    if name != "source": raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return convert.source
