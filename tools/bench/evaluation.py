"""What evaluation costs: zero-shot classification, retrieval, likelihood of captions, writing them.

The models are those that the apps make, with fresh weights; pictures and words are made up, for
their values do not matter here. What runs are the functions of ov_eval and ov_models that the apps'
evaluators call, once weights and data are there and everything is compiled.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench.compiling import load_config
from tools.bench.harness import Benchmark, Case, Plot, Ratio

if TYPE_CHECKING:
  from tools.bench.embedding import Retrieval, Scores, Towers
  from tools.bench.writing import Writer

PIXELS = (84, 160)
TOWERS = "img=Ti/16,txt_name=Ti,txt_decoder_name=Ti,res={},batch_size=64"
WRITER = "img=Ti/16,txt_decoder_name=Ti,res=160,batch_size=16"
# Of ImageNet's validation set, with CLIP's templates and the bare name.
PICTURES, CLASSES, TEMPLATES = 50_000, 1000, 81
CHUNK = 256  # texts at a time, as in the evaluators
BATCH, SOME_PICTURES, SOME_CLASSES = 64, 256, 3  # what is embedded of them
# The largest set for which retrieval is published (COCO), at the width of B/16.
IMAGES, CAPTIONS_EACH, WIDTH = 5000, 5, 512
LENGTHS, CAPTIONS = (16, 32, 64), 4  # tokens of a written caption, captions at a time
SCORED = 32  # captions whose likelihood is measured

Run = Callable[[], dict[str, float]]


def make(scratch: Path) -> Benchmark:
  """The cases; nothing is written."""
  del scratch
  cases = [*_zero_shot(), *_retrieval(), *_likelihood(), *_writing()]
  pairs = ["zero-shot/scores", "retrieval", "likelihood", *(f"writing/{n}" for n in LENGTHS)]
  lines = {
    "keys and values kept": [(n, f"writing/{n}") for n in LENGTHS],
    "all tokens again for each": [(n, f"writing/{n}, naive") for n in LENGTHS],
  }
  return Benchmark(
    "eval",
    f"`zero-shot` is of `apps/configs/openvision.py:{TOWERS.format(PIXELS[-1])}`, and the same at "
    f"{PIXELS[0]} px: {SOME_PICTURES} pictures in batches of {BATCH}; the {TEMPLATES} prompts of "
    f"{SOME_CLASSES} classes; scores of {PICTURES:,} pictures for {CLASSES:,} classes; and, "
    f"estimated from those three, the whole of {PICTURES:,} pictures and {CLASSES * TEMPLATES:,} "
    f"prompts, but for reading pictures. `retrieval` is {IMAGES:,} pictures x "
    f"{IMAGES * CAPTIONS_EACH:,} captions of width {WIDTH}, both ways. The others are of "
    f"`apps/configs/openvision2.py:{WRITER}`: `likelihood` of {SCORED} captions of 127 tokens, "
    f"`writing` {CAPTIONS} captions of so many tokens at once, the likeliest word each time.",
    cases,
    ratios=[Ratio(name, f"{name}, naive") for name in pairs],
    dtype="float32",
    plots=[
      Plot("Writing captions", "tokens of a caption", "tokens_per_cpu_s", lines),
    ],
  )


def _zero_shot() -> list[Case]:
  pictures = {
    size: _Part(functools.partial(_embed_pictures, size), PICTURES / SOME_PICTURES)
    for size in PIXELS
  }
  texts = _Part(lambda: _towers(PIXELS[-1]).texts(), _chunks(CLASSES) / _chunks(SOME_CLASSES))
  scores = _Part(lambda: _scores().ours(), 1)
  cases = [Case(f"zero-shot/pictures, {size} px", part.run) for size, part in pictures.items()]
  cases += [
    Case("zero-shot/texts", texts.run),
    Case("zero-shot/scores", scores.run),
    Case("zero-shot/scores, naive", lambda: _scores().naive()),
  ]
  for size, part in pictures.items():
    whole = functools.partial(_estimate, [part, texts, scores])
    cases.append(Case(f"zero-shot/whole, {size} px", whole, warm_up=False))
  return cases


def _embed_pictures(pixels: int) -> dict[str, float]:
  return _towers(pixels).pictures()


def _chunks(classes: int) -> int:
  """How often the text tower runs for the prompts of so many classes."""
  return math.ceil(classes * TEMPLATES / CHUNK)


@dataclasses.dataclass
class _Part:
  """A case that the whole is estimated from.

  Attributes:
    measure: runs it.
    times: how much more of it the whole has.
    found: when it ran last.
  """

  measure: Run
  times: float
  found: dict[str, float] | None = None

  def run(self) -> dict[str, float]:
    self.found = self.measure()
    return self.found


def _estimate(parts: Sequence[_Part]) -> dict[str, float]:
  """Seconds of the whole, from what ran before it; what `--only` left out runs now."""
  found = [(part.found or part.measure(), part.times) for part in parts]
  return {name: sum(of[name] * times for of, times in found) for name in ("cpu_s", "clock_s")}


def _retrieval() -> list[Case]:
  return [
    Case("retrieval", lambda: _pairs().ours()),
    Case("retrieval, naive", lambda: _pairs().naive(), warm_up=False),
  ]


def _likelihood() -> list[Case]:
  return [
    Case("likelihood", lambda: _writer().likelihood()),
    Case("likelihood, naive", lambda: _writer().naive_likelihood()),
  ]


def _writing() -> list[Case]:
  cases = []
  for length in LENGTHS:
    for name, naive in ((f"writing/{length}", False), (f"writing/{length}, naive", True)):
      cases.append(Case(name, functools.partial(_write, length, naive)))
  return cases


def _write(length: int, naive: bool) -> dict[str, float]:
  writer = _writer()
  return writer.write_naively(length) if naive else writer.write(length)


# Made when the first case needs them, for they import jax.


@functools.cache
def _towers(pixels: int) -> "Towers":
  from tools.bench import embedding

  config = load_config("openvision.py", TOWERS.format(pixels))
  return embedding.Towers(
    config, BATCH, SOME_PICTURES, classes=SOME_CLASSES, templates=TEMPLATES, chunk=CHUNK
  )


@functools.cache
def _scores() -> "Scores":
  from tools.bench import embedding

  return embedding.Scores(PICTURES, CLASSES, BATCH)


@functools.cache
def _pairs() -> "Retrieval":
  from tools.bench import embedding

  return embedding.Retrieval(IMAGES, CAPTIONS_EACH, WIDTH)


@functools.cache
def _writer() -> "Writer":
  from tools.bench import writing

  return writing.Writer(load_config("openvision2.py", WRITER), CAPTIONS, SCORED)
