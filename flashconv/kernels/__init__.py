"""Convolutions on CPUs, in C++ that is compiled for the machine at hand."""

from flashconv.kernels.primitive import available, info

__all__ = ["available", "info"]
