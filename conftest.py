"""Checks shapes and dtypes in signatures, as tools/python/pytest_main.py does under Bazel."""

from tools.python import shapes

shapes.install()
