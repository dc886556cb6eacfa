"""Format the tree, and fix the violations that ruff can fix.

tools/bazel run //tools/lint:fix
"""

import os
import subprocess
import sys

import ruff

if __name__ == "__main__":
  os.chdir(os.environ["BUILD_WORKSPACE_DIRECTORY"])
  tool = ruff.find_ruff_bin()
  fixed = subprocess.run([tool, "check", "--no-cache", "--fix", "."])
  formatted = subprocess.run([tool, "format", "--no-cache", "."])
  sys.exit(fixed.returncode or formatted.returncode)
