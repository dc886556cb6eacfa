"""The Bazel packages with Python code. Lint, type check and wall test see what is listed here."""

PACKAGES = [
    "apps",
    "apps/configs",
    "apps/exporter",
    "apps/trainer",
    "packages/ov-convert",
    "packages/ov-data",
    "packages/ov-eval",
    "packages/ov-losses",
    "packages/ov-models",
    "packages/ov-sharding",
    "tests/end_to_end",
    "tests/golden",
    "tests/multiprocess",
    "tests/sharding",
    "tests/standalone",
    "tools/ci",
    "tools/compare",
    "tools/data",
    "tools/lint",
    "tools/python",
]
