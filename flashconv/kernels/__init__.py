"""Convolutions on CPUs, in C++ that is compiled for the machine at hand."""

from flashconv.kernels.primitive import available, info, use

__all__ = ["available", "info", "use"]
