"""Oracles and helpers of the tests; not part of the wheel."""
