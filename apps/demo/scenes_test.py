"""Tests of scenes: determinism, held-out split, captions, scoring."""

from collections import Counter
import hashlib
import io
import json

import numpy as np
from PIL import Image
import pytest

from apps.demo import scenes


def _sample(count: int, split: scenes.Split = "train", seed: int = 0) -> list[scenes.Scene]:
  return [scenes.sample_scene(seed, i, split) for i in range(count)]


def test_scene_is_a_function_of_seed_index_and_split():
  first = scenes.scene_example(scenes.sample_scene(3, 17))
  assert scenes.scene_example(scenes.sample_scene(3, 17)) == first
  for other in ((4, 17, "train"), (3, 18, "train"), (3, 17, "val")):
    assert scenes.scene_example(scenes.sample_scene(*other))["jpg"] != first["jpg"]


def test_sampling_never_changes():
  """Golden values: changes affect every demo data set and need a changelog entry."""
  captions = "\n".join(s.caption for s in _sample(50) + _sample(50, "heldout"))
  assert hashlib.sha256(captions.encode()).hexdigest()[:16] == "1316f0f4c962e05b"


def _combination(scene: scenes.Scene) -> tuple:
  return tuple((o.colour, o.shape) for o in scene.objects)


def test_held_out_combinations_only_occur_in_held_out_scenes():
  everything = (len(scenes.COLOURS) * len(scenes.SHAPES)) ** 2
  assert 0.08 < len(scenes.HELD_OUT) / everything < 0.17
  assert {pair[::-1] for pair in scenes.HELD_OUT} == scenes.HELD_OUT
  assert not scenes.HELD_OUT & {_combination(s) for s in _sample(2000) + _sample(500, "val")}
  assert all(_combination(s) in scenes.HELD_OUT for s in _sample(1000, "heldout"))


def test_all_objects_occur_in_training():
  sample = _sample(2000)
  objects = [o for s in sample for o in s.objects]
  assert {o.size for o in objects} == set(scenes.SIZES)
  assert {s.relation for s in sample} == {*scenes.RELATIONS, None}
  assert {s.light for s in sample} == {True, False}
  kinds = {(o.colour, o.texture, o.shape) for o in objects}
  assert len(kinds) == len(scenes.COLOURS) * len(scenes.TEXTURES) * len(scenes.SHAPES)
  singles = sum(len(s.objects) == 1 for s in sample)
  # 2000 draws with p = 1/3: mean 667, standard deviation 21.
  assert 580 < singles < 750


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_caption_is_determined_by_image(split: scenes.Split):
  for scene in _sample(500, split):
    if scene.relation is None:
      continue
    a, b = (o.sprite for o in scene.objects)
    assert b.x - a.x > a.radius + b.radius  # the first is left, without overlap
    assert abs(b.y - a.y) >= 0.2
    assert scene.relation == ("above" if a.y < b.y else "below")


def test_objects_are_inside_image_and_sizes_differ():
  for scene in _sample(500):
    for o in scene.objects:
      x, y, r = o.sprite.x, o.sprite.y, o.sprite.radius
      assert r <= x <= 1 - r and r <= y <= 1 - r
      assert r > 0.19 if o.size == "large" else r < 0.151


def test_rendered_colour_matches_caption():
  """The mean colour around the centre is closer to the named colour than to any other."""
  prototypes = {c: np.array(scenes._rgb(*scenes._HSV[c]), float) for c in scenes.COLOURS}
  checked = 0
  for scene in _sample(400):
    pixels = np.asarray(scene.draw(64), float)
    for o in scene.objects:
      if o.texture == "solid":
        x, y = round(o.sprite.x * 64), round(o.sprite.y * 64)
        mean = pixels[y - 2 : y + 2, x - 2 : x + 2].mean((0, 1))
        nearest = min(prototypes, key=lambda c: float(np.abs(prototypes[c] - mean).sum()))
        assert nearest == o.colour, (scene.index, o.phrase, mean)
        checked += 1
  assert checked > 100


@pytest.mark.parametrize("image_size", [32, 64, 100, 256])
def test_example_contains_jpeg_and_truth(image_size: int):
  scene = scenes.sample_scene(0, 5)
  example = scenes.scene_example(scene, image_size)
  image = Image.open(io.BytesIO(example["jpg"]))
  assert image.size == (image_size, image_size) and image.mode == "RGB"
  assert example["txt"] == scene.caption
  assert json.loads(example["truth"]) == scene.truth


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_alt_text_is_an_incomplete_caption(split: scenes.Split):
  kept = []
  for scene in _sample(300, split):
    words = scene.alt_text.split()
    message = [word for word in words if word not in ("a", "an", "and", "object")]
    rest = iter(scene.caption.split())
    assert all(word in rest for word in message), (
      scene.alt_text,
      scene.caption,
    )  # same order
    assert not set(message) & set(scenes.COLOURS)
    could = [w for w in scene.caption.split() if w != "a" and w not in scenes.COLOURS]
    kept.append(len(message) / len(could))
    assert scene.alt_text == scenes.sample_scene(scene.seed, scene.index, split).alt_text
  assert 0.71 < np.mean(kept) < 0.79  # each word is kept with probability 3/4
  assert min(kept) < 0.5 and max(kept) == 1


def test_images_vary():
  means = [np.asarray(s.draw(32)).mean() for s in _sample(64)]
  assert np.std(means) > 30
  assert len({scenes.scene_example(s, 32)["jpg"] for s in _sample(300)}) == 300


def test_invalid_arguments():
  with pytest.raises(ValueError, match="split='test'.*train, heldout, val"):
    scenes.sample_scene(0, 0, "test")
  with pytest.raises(ValueError, match="num_objects=3"):
    scenes.sample_scene(0, 0, num_objects=3)
  with pytest.raises(ValueError, match="seed=-1"):
    scenes.sample_scene(-1, 0)
  with pytest.raises(ValueError, match="image_size=16.*32 to 256"):
    scenes.sample_scene(0, 0).draw(16)


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_true_caption_and_description_get_full_score(split: scenes.Split):
  for scene in _sample(300, split):
    expected = 4 if scene.relation is None else 9
    for text in (scene.caption, scene.description, scene.caption.upper() + "!"):
      result = scenes.score(text, scene.truth)
      assert (result.correct, result.total) == (expected, expected), text


_TRUTH = {
  "objects": [
    {"size": "large", "colour": "red", "texture": "striped", "shape": "circle"},
    {"size": "small", "colour": "blue", "texture": "solid", "shape": "square"},
  ],
  "relation": "above",
}
_FIRST, _SECOND = "a large red striped circle", "a small blue solid square"


@pytest.mark.parametrize(
  ("caption", "correct", "total"),
  [
    (f"{_FIRST} above {_SECOND}", 9, 9),
    (f"{_SECOND} below {_FIRST}", 9, 9),  # equivalent
    (f"{_SECOND} above {_FIRST}", 8, 9),  # wrong relation
    (f"{_FIRST} left of {_SECOND}", 8, 9),
    (f"{_FIRST} {_SECOND}", 8, 9),
    (f"{_FIRST} above {_SECOND} below", 8, 9),  # two relations count as none
    ("a large blue striped circle above a small red solid square", 7, 9),
    ("a big red striped disc over a tiny blue plain square", 9, 9),
    ("a large red blue striped circle above a small blue solid square", 8, 9),
    ("large red red striped circle above small blue solid square", 9, 9),
    (_FIRST, 4, 9),  # all attributes of a missing object are wrong
    (_SECOND, 0, 9),
    ("", 0, 9),
    ("[UNK] lorem ipsum", 0, 9),
    (f"{_FIRST} above {_SECOND} and a small pink dotted cross", 9, 13),  # extra object
  ],
)
def test_score(caption: str, correct: int, total: int):
  result = scenes.score(caption, json.dumps(_TRUTH))
  assert (result.correct, result.total) == (correct, total)
  assert sum(c for c, _ in result.by_kind.values()) == correct


def test_extra_object_costs_five():
  truth = {"objects": _TRUTH["objects"][:1], "relation": None}
  result = scenes.score(f"{_FIRST} above {_SECOND}", truth)
  assert (result.correct, result.total) == (4, 9)


def test_score_by_kind():
  result = scenes.score(f"{_FIRST} above a small blue solid cross", _TRUTH)
  assert (result.correct, result.total) == (8, 9)
  assert result.by_kind["shape"] == (1, 2) and result.by_kind["colour"] == (2, 2)


def test_two_object_scenes_are_labeled_by_colours():
  prompts = scenes.class_prompts("colours")
  assert len(prompts) == 36 and "green and green" in prompts
  for scene in (scenes.sample_scene(1, i, "heldout", 2) for i in range(50)):
    label = scenes.scene_example(scene, 32, "colours")["label"]
    assert sorted(label.split(" and ")) == sorted(o.colour for o in scene.objects)
    for text in prompts[label]:
      objects, _ = scenes.parse_caption(text)
      assert sorted(o["colour"] for o in objects) == sorted(label.split(" and "))
  # The other attributes are independent of the class.
  message = [scenes.parse_caption(text) for text in prompts["red and blue"]]
  for colour in ("red", "blue"):
    like = [o for objects, _ in message for o in objects if o["colour"] == colour]
    assert {o["size"] for o in like} == set(scenes.SIZES)
    assert {o["texture"] for o in like} == set(scenes.TEXTURES)
    assert {o["shape"] for o in like} == set(scenes.SHAPES)
  assert {(objects[0]["colour"], relation) for objects, relation in message} == {
    (colour, relation) for colour in ("red", "blue") for relation in scenes.RELATIONS
  }
  assert "label" not in scenes.scene_example(scenes.sample_scene(1, 0, "heldout", 1), 32, "colours")


@pytest.mark.parametrize(("kind", "classes"), [("shape", 4), ("colour", 8), ("colour_shape", 32)])
def test_class_prompts_partition_single_object_captions(kind: str, classes: int):
  prompts = scenes.class_prompts(kind)
  assert len(prompts) == classes
  counts = Counter(p for group in prompts.values() for p in group)
  assert len(counts) == 192 and set(counts.values()) == {1}
  assert len({len(group) for group in prompts.values()}) == 1
  scene = scenes.sample_scene(0, 0, num_objects=1)
  assert scene.caption in counts


def test_contact_sheet():
  sheet = scenes.contact_sheet(_sample(5), columns=2, image_size=32, scale=2)
  assert sheet.size == (2 * 72 + 8, 3 * (64 + 46 + 8) + 8)
