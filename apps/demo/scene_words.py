"""Language of the demo scenes: vocabulary, scoring of captions, and class prompts.

Captions name every attribute of a scene, so generated captions can be scored per attribute against
the ground truth with `score`. `apps.demo.scenes` creates the scenes.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import json
import re
from typing import Any, Literal

SIZES = ("large", "small")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
TEXTURES = ("solid", "striped", "dotted")
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("above", "below")
KINDS = ("size", "colour", "texture", "shape", "relation")
ATTRIBUTE_WORDS = (*SIZES, *COLOURS, *TEXTURES, *SHAPES, *RELATIONS)
ClassKind = Literal["shape", "colour", "colour_shape", "colours"]
OF_TWO_OBJECTS = "colours"  # kind of class for scenes with two objects; all others: one object
INVERSE_RELATION = {"above": "below", "below": "above"}

_SYNONYMS = {
  "big": "large", "huge": "large", "little": "small", "tiny": "small", "plus": "cross",
  "disc": "circle", "disk": "circle", "plain": "solid", "spotted": "dotted",
  "over": "above", "under": "below", "beneath": "below",
}  # fmt: skip
_KIND_OF = {
  word: kind
  for kind, words in zip(KINDS, (SIZES, COLOURS, TEXTURES, SHAPES, RELATIONS), strict=True)
  for word in words
}
_WORD = re.compile(r"[a-z]+")


@dataclasses.dataclass(frozen=True)
class AttributeScore:
  """Numbers of correct and of all attributes, over all kinds and by kind."""

  correct: int
  total: int
  by_kind: Mapping[str, tuple[int, int]]


def parse_caption(caption: str) -> tuple[list[dict[str, str]], str | None]:
  """Return the objects that a caption names, in order, and the relation, if it names one.

  A shape word ends an object; the size, colour and texture words before it belong to it. An
  attribute with two different words, and a second relation, count as missing.
  """
  objects: list[dict[str, str]] = []
  current: dict[str, str] = {}
  relations: set[str] = set()
  for word in _WORD.findall(caption.lower()):
    word = _SYNONYMS.get(word, word)
    kind = _KIND_OF.get(word)
    if kind == "relation":
      relations.add(word)
    elif kind is not None:
      current[kind] = word if current.get(kind, word) == word else "contradiction"
      if kind == "shape":
        objects.append(current)
        current = {}
  return objects, relations.pop() if len(relations) == 1 else None


def score(caption: str, truth: Mapping[str, Any] | str | bytes) -> AttributeScore:
  """Count the correct attributes of a caption.

  There are four attributes per object, and a relation between two objects: 4 or 9 in total. A
  missing object counts as four wrong; each extra object adds four wrong (and its implied relation
  one more). "B below A" is correct if the truth is "A above B".

  Args:
    caption: generated text; unknown words are ignored.
    truth: `Scene.truth`, or its JSON as stored in the records.
  """
  facts = json.loads(truth) if isinstance(truth, str | bytes) else truth
  predicted, relation = parse_caption(caption)
  plain = _count(predicted, relation, facts)
  if len(predicted) != 2:
    return plain
  swapped = _count(predicted[::-1], INVERSE_RELATION.get(relation or ""), facts)
  return max(plain, swapped, key=lambda s: s.correct)


def _count(
  predicted: list[dict[str, str]], relation: str | None, truth: Mapping[str, Any]
) -> AttributeScore:
  true = truth["objects"]
  counts: dict[str, tuple[int, int]] = {}
  for kind in KINDS[:-1]:
    right = sum(s.get(kind) == t[kind] for s, t in zip(predicted, true, strict=False))
    counts[kind] = (right, max(len(predicted), len(true)))
  if len(true) > 1 or len(predicted) > 1:
    counts["relation"] = (int(len(true) > 1 and relation == truth["relation"]), 1)
  correct, total = (sum(c[i] for c in counts.values()) for i in (0, 1))
  return AttributeScore(correct, total, counts)


def class_prompts(kind: ClassKind) -> dict[str, list[str]]:
  """Return the captions of each class, for zero-shot classification.

  "shape", "colour", "colour_shape": every caption of a single object belongs to exactly one class
  (192 in total), so the class likelihood is the sum over the attributes that the class does not
  fix. "colours": two objects, as "red and blue" (36 classes), with twelve captions each, in which
  every other attribute, the relation and the order take all their values.
  """
  prompts: dict[str, list[str]] = {}
  if kind == OF_TWO_OBJECTS:
    for pair in itertools.combinations_with_replacement(COLOURS, 2):
      prompts[class_name([(colour, "") for colour in pair], kind)] = [
        f"{_filled(left, i)} {RELATIONS[i // 6]} {_filled(right, 5 * i + 1)}"
        for i in range(12)
        for left, right in [pair if i // 3 % 2 else pair[::-1]]
      ]
    return prompts
  for colour, shape, size, texture in itertools.product(COLOURS, SHAPES, SIZES, TEXTURES):
    name = class_name([(colour, shape)], kind)
    prompts.setdefault(name, []).append(f"a {size} {colour} {texture} {shape}")
  return prompts


def _filled(colour: str, i: int) -> str:
  size, texture, shape = (words[i % len(words)] for words in (SIZES, TEXTURES, SHAPES))
  return f"a {size} {colour} {texture} {shape}"


def class_name(objects: Sequence[tuple[str, str]], kind: ClassKind) -> str:
  """Return the class of a scene.

  Args:
    objects: colour and shape of each object.
    kind: "colours" for two objects, another kind for one.

  Raises:
    ValueError: the kind is unknown.
  """
  colour, shape = objects[0]
  names = {"shape": shape, "colour": colour, "colour_shape": f"{colour} {shape}"}
  if len(objects) == 2:
    names[OF_TWO_OBJECTS] = " and ".join(sorted((colour, objects[1][0]), key=COLOURS.index))
  if kind not in names:
    raise ValueError(f"kind of class {kind!r}: expected one of {', '.join(names)}.")
  return names[kind]
