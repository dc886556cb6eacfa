"""Weights in and out of OpenVision models."""

from ov_convert import openvision_jax

__all__ = ["openvision_jax"]
