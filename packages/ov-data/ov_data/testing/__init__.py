"""Helpers of the tests and benchmarks of data formats. Not part of the wheel."""
