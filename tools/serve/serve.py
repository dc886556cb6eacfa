"""Serve a model and an index: a web page, a JSON API and OpenAI-compatible embeddings.

  bazel run //tools/serve -- --index=/data/photos.index --port=8000

Listens on the loopback address. There are no passwords and no encryption: for other machines, put a
proxy in front, or give --host and --allow_host in a trusted network.
"""

from apps.trainer import startup

if __name__ == "__main__":
  startup.set_up()  # before slow imports

import logging
import math

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors
from tools.serve.common_flags import INDEX, MODEL

_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0 for any free port.")
_ALLOW_HOST = flags.DEFINE_list("allow_host", [], "Names of this server in the Host header.")
_MAX_MB = flags.DEFINE_float("max_mb", 16.0, "Maximum size of a request in MB.")
_MAX_PIXELS = flags.DEFINE_integer("max_pixels", 32_000_000, "Maximum pixels of an image.")


def main() -> None:
  if not (INDEX.value or MODEL.value):
    raise UserError("give --index=FOLDER, or --model=FOLDER for a server without search")
  with user_errors():
    serve()


def serve() -> None:
  """Serve according to the flags.

  Raises:
    ValueError, OSError: if flags or files are invalid; the messages address the user.
  """
  import ov_serve
  from ov_serve import guard, serving

  logging.getLogger("ov_serve").setLevel(logging.INFO)
  if not 0 < _MAX_MB.value < math.inf:
    raise ValueError(f"max_mb={_MAX_MB.value:g}: expected a number above 0")
  limits = guard.Limits(body_bytes=int(_MAX_MB.value * 2**20), pixels=_MAX_PIXELS.value)
  index = ov_serve.Index.open(INDEX.value) if INDEX.value else None
  if index is None:
    model = ov_serve.Model.load(MODEL.value or "")
  else:
    model = ov_serve.Model.of_index(index, MODEL.value)
  print(f"{model.name}: {0 if index is None else len(index):,} images", flush=True)
  serving.serve(
    model,
    index,
    host=_HOST.value,
    port=_PORT.value,
    allow_hosts=tuple(_ALLOW_HOST.value),
    limits=limits,
  )


if __name__ == "__main__":
  run_app(main)
