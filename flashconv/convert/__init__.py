"""PyTorch's and `mlx.nn`'s layers, states and models to flashconv's and back."""

from flashconv.convert.layers import from_mlx, from_torch, to_mlx, to_torch
from flashconv.convert.mlx_weights import load_mlx_weights
from flashconv.convert.models import conversion_report, convert_model
from flashconv.convert.state import load_torch_state, save_torch_state, to_torch_state
from flashconv.convert.swap import downgrade, upgrade

__all__ = [
    "from_torch", "to_torch", "from_mlx", "to_mlx", "load_mlx_weights", "load_torch_state",
    "save_torch_state", "to_torch_state", "convert_model", "conversion_report", "source",
    "upgrade", "downgrade"]


def __getattr__(name):
    "`source`, with the table of operations behind it, is loaded when it is asked for."
    if name != "source": raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flashconv.convert.network_source import source
    return source
