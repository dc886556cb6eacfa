"""Planted duplicates and wrong captions are found, and the loader reads what is left."""

import dataclasses
import io

import numpy as np
from PIL import Image, ImageDraw
import pytest

import ov_data
from ov_data import annotation, annotations, decode, keep_list
from ov_data.annotations import Annotations
from tools.data import keep, selection
from tools.testing import program

LEVELS = (32, 96, 160, 224)  # centers of four bins of a color channel
NAMES = {
  "black": (32, 32, 32), "red": (224, 32, 32), "green": (32, 224, 32), "blue": (32, 32, 224),
  "yellow": (224, 224, 32), "cyan": (32, 224, 224), "pink": (224, 32, 224),
  "white": (224, 224, 224),
}  # fmt: skip
UNIQUE, COPIES, WRONG = 1000, 200, 200  # COPIES of each kind: 2,000 records
KINDS = ("exact", "re-encoded", "resized", "cropped")


class HistogramModel:
  """Fake model: an image is the root of its color histogram, a text the bin of its color."""

  fingerprint, dim, can_embed_text, can_caption = "4157", 64, True, True

  def decode(self, data, limits=decode.DEFAULT_LIMITS):
    return decode.whole(data, 64, "squash", limits)

  def embed_images(self, images):
    bins = (images // 64).astype(np.int64) @ np.array([16, 4, 1])
    counts = np.stack([np.bincount(row.ravel(), minlength=64) for row in bins])
    roots = np.sqrt(counts).astype(np.float32)
    return roots / np.linalg.norm(roots, axis=1, keepdims=True)

  def embed_texts(self, texts):
    colors = np.array([NAMES[text.split()[-2]] for text in texts])
    return np.eye(64, dtype=np.float32)[(colors // 64) @ np.array([16, 4, 1])]

  def caption_log_likelihood(self, images, texts):
    return -np.array([len(text) for text in texts], np.float32)


def _drawing(random):
  """Return shapes of random colors on a background, and the name of its color."""
  name = random.choice([*NAMES])
  image = Image.new("RGB", (240, 200), NAMES[name])
  draw = ImageDraw.Draw(image)
  for number in range(9):
    left, top = random.integers(-20, 200, 2).tolist()
    width, height = random.integers(20, 110, 2).tolist()
    shape = draw.ellipse if number % 2 else draw.rectangle
    shape((left, top, left + width, top + height), fill=tuple(random.choice(LEVELS, 3).tolist()))
  return image, str(name)


def _jpeg(image, quality=92):
  file = io.BytesIO()
  image.save(file, "JPEG", quality=quality)
  return file.getvalue()


def _copy(kind, image):
  if kind == "exact":
    return _jpeg(image)
  if kind == "re-encoded":
    return _jpeg(image, 60)
  if kind == "resized":
    return _jpeg(image.resize((150, 125), Image.Resampling.BICUBIC))
  width, height = image.size
  return _jpeg(image.crop((width // 20, height // 20, width * 19 // 20, height * 19 // 20)))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
  """Shards of 2,000 drawings in random order, with (kind, number of the drawing) of each."""
  random = np.random.default_rng(20)
  records = []
  for number in range(UNIQUE):
    image, color = _drawing(random)
    records.append(("original", number, _jpeg(image), f"shapes on {color} paper"))
    if number < COPIES * len(KINDS):
      kind = KINDS[number // COPIES]
      records.append((kind, number, _copy(kind, image), f"copy on {color} paper"))
  for number in range(UNIQUE, UNIQUE + WRONG):
    image, color = _drawing(random)
    other = random.choice([name for name in NAMES if name != color])
    records.append(("mismatched", number, _jpeg(image), f"shapes on {other} paper"))
  records = [records[at] for at in random.permutation(len(records))]
  assert len(records) == 2000
  folder = tmp_path_factory.mktemp("planted")
  (folder / "data").mkdir()
  for shard in range(4):
    path = str(folder / "data" / f"train-{shard:05}-of-00004.tfrecord")
    with ov_data.ShardWriter(path) as writer:
      for _, _, image, text in records[500 * shard : 500 * (shard + 1)]:
        writer.write({"jpg": image, "txt": text})
  dataset = ov_data.Dataset(ov_data.Source(str(folder / "data"), split="train"))
  annotation.annotate(dataset, folder / "notes", model=HistogramModel())
  return folder, [record[:2] for record in records]


def _duplicates(planted, rules):
  """Return precision, and recall by kind, of rules for duplicates.

  A dropped record is right if a record of the same drawing is kept. A copy is found if one of the
  two records of its drawing is dropped.
  """
  folder, records = planted
  kept = selection.select(Annotations.open(str(folder / "notes")), rules).keep.kept
  left = {number for (_, number), is_kept in zip(records, kept) if is_kept}
  dropped = [number for (_, number), is_kept in zip(records, kept) if not is_kept]
  precision = sum(number in left for number in dropped) / max(1, len(dropped))
  lost = set(dropped)
  recall = {
    kind: np.mean([number in lost for name, number in records if name == kind]) for kind in KINDS
  }
  return precision, recall


# Measured on 2026-11-30: precision 1.000 of all rules; recall 1.000, except 0.000 for the zeros of
# the first rule and 0.18 for crops by hash. Other versions of libjpeg change single pixels, which
# may move few of the 200 copies across a limit. The fake model ignores positions.
@pytest.mark.parametrize(
  ("rules", "recall"),
  [
    (selection.Rules(exact_duplicates=True), (1.0, 0.0, 0.0, 0.0)),
    (selection.Rules(perceptual_distance=6), (1.0, 0.98, 0.98, 0.1)),
    (selection.Rules(embedding_similarity=0.97), (1.0, 0.98, 0.98, 0.98)),
  ],
)
def test_planted_duplicates(planted, rules, recall):
  precision, by_kind = _duplicates(planted, rules)
  print(f"{rules}: precision {precision:.3f}, recall {by_kind}")
  assert precision >= 0.99
  assert all(by_kind[kind] >= least for kind, least in zip(KINDS, recall))


def test_planted_wrong_captions(planted):
  """The root of the fraction of the named color is above 0.5 for most right captions."""
  folder, records = planted
  rules = selection.Rules("similarity > 0.45")
  kept = selection.select(Annotations.open(str(folder / "notes")), rules).keep.kept
  is_wrong = np.array([kind == "mismatched" for kind, _ in records])
  precision, recall = (is_wrong & ~kept).sum() / (~kept).sum(), (~kept)[is_wrong].mean()
  print(f"mismatched captions: precision {precision:.3f}, recall {recall:.3f}")
  assert precision > 0.8 and recall > 0.9


def test_the_loader_reads_what_the_table_keeps(planted):
  folder, records = planted
  done = program.run(
    keep, "--annotations=notes", "--output=keep", "--where=similarity > 0.45 and width >= 200",
    "--exact_duplicates", "--perceptual_distance=6", "--embedding_similarity=0.97", cwd=folder,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  *table, last = done.stdout.splitlines()
  print(done.stdout)
  rules = [line.rsplit(None, 2) for line in table]
  assert [name.strip() for name, _, _ in rules] == [
    "rule", "unusable record", "similarity > 0.45 is false", "similarity > 0.45 is unknown",
    "width >= 200 is false", "width >= 200 is unknown", "same content as an earlier record",
    "perceptual hash within 6 bits of an earlier record",
    "embedding similarity of at least 0.97 to an earlier record",
  ]  # fmt: skip
  counts = {name.strip(): int(dropped.replace(",", "")) for name, dropped, _ in rules[1:]}
  left = int(rules[-1][2].replace(",", ""))
  assert last.startswith(f"keep: {left:,} of 2,000 records kept, fingerprint ")
  source = ov_data.Source(str(folder / "data"), split="train", keep_list=str(folder / "keep"))
  tokenizer = ov_data.Tokenizer.train([f"copy shapes on {name} paper" for name in NAMES], 60)
  kept = ov_data.KeepList.read(str(folder / "keep")).kept
  expected = ov_data.Dataset(ov_data.Source(str(folder / "data"), split="train"))
  texts = sorted(expected.read(n).texts["txt"][0] for n in np.flatnonzero(kept).tolist())
  loader = ov_data.Loader(
    source, image_size=8, batch_size=64, tokenizer=tokenizer, text_len=8, passes=1,
    captions="all",
  )  # fmt: skip
  with loader:
    found = [text.encode() for batch in loader for row in batch["captions"] for text in row or ()]
    assert sorted(found) == texts and len(found) == left == loader.num_examples
    assert loader.dropped == {name: count for name, count in counts.items() if count}
    assert not loader.skipped
  # One record of each of the 1,000 drawings with right captions; the tolerance is that above.
  drawings = [number for (_, number), is_kept in zip(records, kept) if is_kept]
  assert len({number for number in drawings if number < UNIQUE}) >= 0.98 * UNIQUE
  assert len(drawings) <= 1.02 * UNIQUE


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  """Seven records: 1 equals 0, 4 equals 2, 3 is no image, 5 has no caption, 6 is small."""
  folder = tmp_path_factory.mktemp("small")
  random = np.random.default_rng(0)
  images = [_jpeg(_drawing(random)[0]) for _ in range(3)]
  tiny = _jpeg(_drawing(random)[0].resize((40, 30)))
  with ov_data.ShardWriter(str(folder / "data.tfrecord")) as writer:
    for image, text in (
      (images[0], "a red paper"), (images[0], "a red paper"), (images[1], "a blue paper"),
      (b"no image", "a red paper"), (images[1], "a red paper"), (images[2], ""),
      (tiny, "a red paper"),
    ):  # fmt: skip
      writer.write({"jpg": image, "txt": text})
  dataset = ov_data.Dataset(ov_data.Source(str(folder / "data.tfrecord")))
  heads = {"brightness": annotation.LinearHead(np.linspace(0, 1, 64, dtype=np.float32))}
  options = dict(
    model=HistogramModel(), texts=True, likelihood=True, heads=heads, max_bad_fraction=0.5
  )
  annotation.annotate(dataset, folder / "notes", **options)
  return folder


@pytest.mark.parametrize(
  ("rules", "kept", "counts"),
  [
    (selection.Rules("width >= 100"), [0, 1, 2, 4, 5], {"width >= 100 is false": 1}),
    (selection.Rules("similarity >= -1"), [0, 1, 2, 4, 6], {"similarity >= -1 is unknown": 1}),
    (selection.Rules("similarity is None or record != 1"), [0, 2, 4, 5, 6], None),
    (
      selection.Rules(exact_duplicates=True),
      [0, 2, 5, 6],
      {"same content as an earlier record": 2},
    ),
    # The first copy is dropped before, so the second is no repetition.
    (selection.Rules("record > 0", exact_duplicates=True), [1, 2, 5, 6], None),
    (selection.Rules(perceptual_distance=0), [0, 2, 5, 6], None),
    (selection.Rules(embedding_similarity=0.9999), [0, 2, 5, 6], None),
    (selection.Rules("caption_log_likelihood > -12"), [0, 1, 4, 6], None),
    (selection.Rules("brightness > -1 and caption_log_likelihood is None"), [5], None),
    # All but record 5, which has no text, match fewer queries than the limit.
    (
      selection.Rules(queries=("red", "BLUE paper", "cat"), limit=4),
      [0, 1, 2, 4, 6],
      {"no query matches": 1},
    ),
    (selection.Rules("record < 2", queries=("red",), limit=2), [0, 1], None),
    (selection.Rules(clusters=1, limit=6), [0, 1, 2, 4, 5, 6], {}),
    (selection.Rules("1 < 2"), [0, 1, 2, 4, 5, 6], {}),
  ],
)
def test_rules(small, rules, kept, counts):
  notes = Annotations.open(str(small / "notes"))
  visited = []
  selected = selection.select(notes, rules, visited.append)
  found, dropped = selected.keep, selected.dropped
  assert np.flatnonzero(found.kept).tolist() == kept
  assert dropped["unusable record"] == 1 and sum(dropped.values()) == 7 - len(kept)
  if counts is not None:
    assert {k: n for k, n in dropped.items() if n and k != "unusable record"} == counts
  assert sum(visited) == 7 * selection.passes(rules)
  assert found.source == keep_list.identity(
    ov_data.Dataset(ov_data.Source(str(small / "data.tfrecord")))
  )


@pytest.fixture(scope="module")
def long_tail(tmp_path_factory):
  """Annotations of 3,000 records: 2,000 red, 900 blue, 100 green; every 50th also has a cat."""
  folder = tmp_path_factory.mktemp("tail")
  colors = ["red"] * 2000 + ["blue"] * 900 + ["green"] * 100
  order = np.random.default_rng(3).permutation(3000)
  texts = [f"{colors[n]} paper{' and a cat' if not n % 50 else ''}" for n in order]
  vectors = np.eye(8, dtype=np.float16)[
    [["red", "blue", "green"].index(text.split()[0]) for text in texts]
  ]
  rows = annotations.Rows(record=[*range(3000)], texts=[[text, text] for text in texts])
  rows.error = rows.location = [None] * 3000
  rows.image_embedding = [*vectors]
  info = annotations.Info(
    "5ource", "", (1000, 0, 2000), "m", ("record", "error", "location", "image_embedding", "texts"),
    8,
  )  # fmt: skip
  writer = annotations.Writer(folder, info, "recipe")
  start = 0
  for shard, count in enumerate(info.rows):
    part = annotations.Rows()
    for name in info.columns:
      setattr(part, name, getattr(rows, name)[start : start + count])
    writer.write(shard, part)
    start += count
  return writer.finish(), texts


def test_balance_by_queries(long_tail):
  found, texts = long_tail
  rules = selection.Rules(queries=("red", "blue", "green", "a cat", "dog"), limit=150, seed=1)
  selected = selection.select(found, rules)
  kept = selected.keep.kept
  assert selected.balance.before.tolist() == [2000, 900, 100, 60, 0]
  after = {q: sum(q in text for text, keep in zip(texts, kept) if keep) for q in rules.queries}
  assert [*after.values()] == selected.balance.after.tolist()
  # Records of small groups are all kept. Others are binomial with a standard deviation below
  # sqrt(150) = 12, tolerance four of them, and up to 60 are kept by their cat.
  assert after["green"] == 100 and after["a cat"] == 60 and after["dog"] == 0
  assert 100 < after["red"] < 260 and 100 < after["blue"] < 260
  assert selected.dropped["balance of 150 per query"] == 3000 - kept.sum()
  assert "query groups: 5, of which 4 have records, and 2 more than 150" in str(selected.balance)
  assert f"'red': 2,000 records, {after['red']:,} kept" in str(selected.balance)
  assert selection.select(found, rules).keep.fingerprint == selected.keep.fingerprint
  other = selection.select(found, dataclasses.replace(rules, seed=2))
  assert other.keep.fingerprint != selected.keep.fingerprint


def test_balance_by_clusters(long_tail):
  found, texts = long_tail
  for clusters in (3, 30):  # some of 30 centers are equal, and stay empty
    selected = selection.select(found, selection.Rules(clusters=clusters, limit=150))
    kept = [text.split()[0] for text, keep in zip(texts, selected.keep.kept) if keep]
    assert selected.balance.before.sum() == 3000
    assert selected.balance.after.sum() == len(kept) == len(selected.keep)
    if clusters == 30:
      # Random first centers: at least red and blue are among them. Binomial, as above.
      assert kept.count("green") == 100
      assert kept.count("red") == pytest.approx(150, abs=50)
      assert kept.count("blue") == pytest.approx(150, abs=50)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--annotations=notes"], "give --annotations=FOLDER and --output=FILE"),
    (["--annotations=notes", "--output=x"], "no rule: give --where"),
    (["--annotations=data", "--output=x", "--exact_duplicates"], "has no annotations.json"),
    (["--annotations=notes", "--output=x", "--where=depth > 1"], "there is no column 'depth'"),
    (["--annotations=notes", "--output=x", "--where=width(1) > 2"], "is not a number or column"),
    (["--annotations=notes", "--output=x", "--where=width > 9999"], "all 7 records are dropped"),
    (["--annotations=notes", "--output=x", "--perceptual_distance=64"], "distance=64"),
    (["--annotations=notes", "--output=x", "--embedding_similarity=2"], "similarity=2.0"),
    (["--annotations=notes", "--output=x", "--balance_clusters=2"], "with --balance_limit, or"),
    (["--annotations=notes", "--output=x", "--balance_limit=2"], "with --balance_limit, or none"),
    (
      ["--annotations=notes", "--output=x", "--balance_clusters=7", "--balance_limit=2"],
      "balance_clusters=7, but only 6 records are left",
    ),
    (
      ["--annotations=notes", "--output=x", "--balance_queries=no", "--balance_limit=2"],
      "expected a UTF-8 file with one query per line",
    ),
    (["--annotations=notes", "--output=no/x", "--exact_duplicates"], "no is not a folder"),
    (["--annotations=notes", "--output=data.tfrecord", "--exact_duplicates"], "exists, and runs"),
  ],
)
def test_mistakes_are_reported_in_one_line(small, arguments, message):
  done = program.run(keep, *arguments, cwd=small)
  assert done.returncode == 2
  assert message in done.stderr.splitlines()[-1]
  assert not (small / "x").exists()


def test_the_command_balances(small):
  (small / "queries").write_text("red\nblue paper\n\n!\n")
  done = program.run(
    keep, "--annotations=notes", "--output=balanced", "--balance_queries=queries",
    "--balance_limit=4", cwd=small,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  *_, title, red, blue, last = done.stdout.splitlines()
  assert title == (
    "query groups: 2, of which 2 have records, and 0 more than 4; 1 without letters or digits "
    "ignored"
  )
  assert (red, blue) == ("  'red': 4 records, 4 kept", "  'blue paper': 1 records, 1 kept")
  assert last.startswith("balanced: 5 of 7 records kept")


def test_annotations_without_model(small):
  dataset = ov_data.Dataset(ov_data.Source(str(small / "data.tfrecord")))
  annotation.annotate(dataset, small / "plain", max_bad_fraction=0.5)
  notes = Annotations.open(str(small / "plain"))
  for rules in (selection.Rules("similarity > 0.2"), selection.Rules(embedding_similarity=0.9)):
    with pytest.raises(ValueError, match=r"has no column .* Annotate with --model"):
      selection.select(notes, rules)
  with pytest.raises(ValueError, match=r"has no column 'texts'"):
    selection.select(notes, selection.Rules(queries=("red",), limit=1))


def test_a_table():
  assert selection.table({"width > 5 is false": 1200, "unusable record": 3}, 5000) == (
    "rule                      dropped           left\n"
    "width > 5 is false          1,200          3,800\n"
    "unusable record                 3          3,797"
  )
