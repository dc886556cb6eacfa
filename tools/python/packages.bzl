"""The Bazel packages with Python code. Lint, type check and wall test see what is listed here."""

PACKAGES = [
    "apps/trainer",
    "packages/ov-eval",
    "packages/ov-losses",
    "packages/ov-sharding",
    "tests/golden",
    "tests/multiprocess",
    "tests/sharding",
    "tests/standalone",
    "tools/ci",
    "tools/data",
    "tools/lint",
    "tools/python",
]
