"""What runs on a worker: one file, `pack` makes it, `tpu sync` copies it there.

  python3 ov-worker.pyz unpack ov-code.tgz SHA256
  python3 ov-worker.pyz setup tpu [LIBTPU]
  python3 ov-worker.pyz count | counted SECONDS
  python3 ov-worker.pyz start RUN RESTARTS APP ARGUMENTS...
  python3 ov-worker.pyz status RUN | terminate RUN | stop RUN GRACE
  python3 ov-worker.pyz check [BUCKET] | clean
  python3 ov-worker.pyz held | kill GRACE PID:START...

Prints one JSON object; {"error": "one line"} where it refuses, for gcloud mixes what programs write
to stderr with words of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
import sys
import zipfile

from tools.tpu.worker import chips, common, machine, runs

_VERBS = (
  machine.unpack, machine.setup, machine.count, machine.counted, machine.check, machine.clean,
  chips.held, chips.kill,
  runs.start, runs.supervise, runs.status, runs.terminate, runs.stop,
)  # fmt: skip


def main() -> None:
  verbs = {function.__name__: function for function in _VERBS}
  try:
    answer = verbs[sys.argv[1]](*sys.argv[2:])
  except (common.Refused, OSError) as refused:
    answer = {"error": str(refused)}
  if answer is not None:
    print(json.dumps(answer), flush=True)


def pack(target: Path) -> None:
  """Writes this program as a file that Python runs; the home folder is then not on its path."""
  folder = "tools/tpu/worker"
  with zipfile.ZipFile(target, "w") as archive:
    archive.writestr("__main__.py", "from tools.tpu.worker.main import main\n\nmain()\n")
    for name in ("tools", "tools/tpu", folder):
      archive.writestr(f"{name}/__init__.py", "")
    for module in (chips, common, machine, runs, sys.modules[__name__]):
      path = Path(str(module.__file__))
      archive.write(path, f"{folder}/{path.name}")
