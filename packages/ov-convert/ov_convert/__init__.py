"""Import and export of OpenVision weights."""

from ov_convert import openvision_jax

__all__ = ["openvision_jax"]
