"""Serve a model and an index: python -m ov_serve --index=photos.index --port=8000."""

import argparse
import logging
import sys
from typing import NoReturn

import ov_serve
from ov_serve import serving


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    self.exit(2, f"ov_serve: error: {message}; --help lists the flags\n")


def main(arguments: list[str] | None = None) -> None:
  """Serve until the process is stopped; mistakes end with one line and exit code 2."""
  parser = _Parser("ov_serve", description=__doc__)
  parser.add_argument("--index", help="folder of the index")
  parser.add_argument("--model", help="folder of an exported model; default: of the index")
  parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
  parser.add_argument("--port", type=int, default=8000, help="port to listen on")
  parser.add_argument("--allow_host", action="append", default=[], help="name in the Host header")
  given = parser.parse_args(arguments)
  if not (given.index or given.model):
    parser.error("give --index=FOLDER, or --model=FOLDER for a server without search")
  logging.basicConfig(format="%(message)s")
  logging.getLogger("ov_serve").setLevel(logging.INFO)  # not those of libraries
  try:
    index = ov_serve.Index.open(given.index) if given.index else None
    if index is None:
      model = ov_serve.Model.load(given.model)
    else:
      model = ov_serve.Model.of_index(index, given.model)
    serving.serve(
      model, index, host=given.host, port=given.port, allow_hosts=tuple(given.allow_host)
    )
  except (ValueError, OSError) as error:
    sys.exit(_report(error))


def _report(error: Exception) -> int:
  text = str(error)
  if isinstance(error, OSError) and error.filename:
    text = f"{error.filename}: {error.strerror}"
  print(f"ov_serve: error: {' '.join(text.split())}", file=sys.stderr)
  return 2


if __name__ == "__main__":
  main()
