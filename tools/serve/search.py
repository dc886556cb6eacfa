"""Search the images of an index by text or by image.

  bazel run //tools/serve:search -- --index=/data/photos.index "a red car at night"
  bazel run //tools/serve:search -- --index=/data/photos.index --image=photo.jpg

Prints one line per image: cosine similarity, name, and the first caption or the class.
"""

from apps.trainer import startup

if __name__ == "__main__":
  startup.set_up()  # before slow imports

from pathlib import Path

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors
from tools.serve.common_flags import INDEX, MODEL

_IMAGE = flags.DEFINE_string("image", None, "Search by this image instead of a text.")
_COUNT = flags.DEFINE_integer("count", 10, "Number of images.")
_EXACT = flags.DEFINE_bool("exact", False, "Compare with every image, without the graph.")


def main(words: list[str]) -> None:
  if not INDEX.value or bool(words) == bool(_IMAGE.value):
    raise UserError('give --index=FOLDER, and a text such as "a red car" or --image=FILE')
  with user_errors():
    print(search(INDEX.value, " ".join(words)))


def search(folder: str, text: str) -> str:
  """Return the table of images.

  Raises:
    ValueError, OSError: if flags or files are invalid; the messages address the user.
  """
  from ov_data import decode
  import ov_serve
  from ov_serve.model import read_image

  index = ov_serve.Index.open(folder)
  model = ov_serve.Model.of_index(index, MODEL.value)
  if _IMAGE.value:
    try:
      pixels = model.decode(read_image(Path(_IMAGE.value)))
    except decode.DecodeError as error:
      raise ValueError(f"--image={_IMAGE.value} is not usable: {error}") from error
    vector = model.embed_images(pixels[None])
  else:
    vector = model.embed_texts([text])
  [hits] = index.search(vector, _COUNT.value, method="exact" if _EXACT.value else "auto")
  lines = []
  for hit in hits:
    entry = index.record(hit.row)
    about = entry.captions[0] if entry.captions else entry.class_name or ""
    lines.append(f"{hit.score:.4f}  {entry.key}  {startup.printable(about)}".rstrip())
  return "\n".join(lines) or f"{folder} holds no images"


if __name__ == "__main__":
  run_app(main, arguments=True)
