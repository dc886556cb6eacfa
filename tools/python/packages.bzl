"""The Bazel packages with Python code. Lint, type check and wall test see what is listed here."""

PACKAGES = [
    "packages/ov-eval",
    "tests/standalone",
    "tools/ci",
    "tools/lint",
    "tools/python",
]
