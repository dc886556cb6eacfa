"""Tests that the JavaScript of the web page tokenizes and preprocesses as Python, run by Node."""

import io
import json
import pathlib
import random
import shutil
import subprocess

import numpy as np
from PIL import Image
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from apps.exporter import probe
import ov_data
from ov_data import bert, decode
from ov_data.text_processor import canonicalise_text

WEB = pathlib.Path(__file__).with_name("web")
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="Node.js is not installed")

# Without U+0EBA, whose combining class is newer than the Unicode version of `tokenizers`.
_RANGES = (  # of characters: Latin, Greek, Cyrillic, Hebrew, Arabic, Indic, Thai, CJK, emoji, ...
  (0x20, 0x7F), (0xA0, 0x250), (0x2B0, 0x3FF), (0x400, 0x52F), (0x5D0, 0x5EA), (0x600, 0x6FF),
  (0x900, 0x97F), (0xE00, 0xE7F), (0xE80, 0xEB9), (0x1000, 0x109F), (0x1780, 0x17DD),
  (0x2000, 0x206F), (0x20A0, 0x20BF), (0x2100, 0x214F), (0x3000, 0x30FF), (0x4E00, 0x4F00),
  (0xAC00, 0xAC80), (0xF900, 0xF930), (0xFF00, 0xFFEF), (0x1F600, 0x1F64F), (0x20000, 0x20040),
)  # fmt: skip
_WORDS = [
  "a",
  "photo",
  "of",
  "the",
  "café",
  "in",
  "ZÜRICH",
  "naïve",
  "don't",
  "hyphen-ated",
  "3.5",
  "€",
  "½",
  "price™",
  "İstanbul",
  "ΣΟΦΟΣ",
  "straße",
  "東京タワー",
  "at",
  "night",
  "ร้านกาแฟ",
  "한국어",
  "[bos]",
  "[eos]",
  "[UNK]",
  "##",
  "\u200bzero\xad",
  "width",
  "é",
  "\x85",
  "\t",
  "\n",
  "\x00",
  "￭joined",
  "(close-up)",
  "it's",
  "we'll",
  "I'D",
  "ﬁne",
  "９９",
  "👩\u200d👧",
  "قهوة",
  "नमस्ते",
  "�",
  "word_with_underscores",
  "<|endoftext|>",
]


def texts(count: int = 1000) -> list[str]:
  rng = random.Random(0)
  found = ["", " ", "word " * 300, "x" * 99, "x" * 100, "x" * 101, "é" * 257, *_WORDS]
  while len(found) < count:
    parts = []
    for _ in range(rng.randint(1, 9)):
      if rng.random() < 0.6:
        parts.append(rng.choice(_WORDS))
      else:
        start, stop = rng.choice(_RANGES)
        parts.append("".join(chr(rng.randrange(start, stop)) for _ in range(rng.randint(1, 6))))
    found.append(rng.choice(("", " ")).join(parts))
  return found


def trained(**options) -> ov_data.Tokenizer:
  return ov_data.Tokenizer.train(texts()[:700], 900, **options)


def as_bert() -> ov_data.Tokenizer:
  vocabulary = json.loads(trained(kind="pieces").to_json())["model"]["vocab"]
  return ov_data.Tokenizer(bert.backend(vocabulary), append_cls=True)


def as_clip() -> ov_data.Tokenizer:
  """A byte-level BPE tokenizer with the text preparation of CLIP's tokenizer.json."""
  backend = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
  backend.normalizer = normalizers.Sequence(
    [
      normalizers.NFC(),
      normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
      normalizers.Lowercase(),
    ]
  )
  pattern = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
  )
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(pattern), "removed", invert=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=900, end_of_word_suffix="</w>", show_progress=False,
    special_tokens=["<|startoftext|>", "<|endoftext|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )  # fmt: skip
  backend.train_from_iterator(texts()[:700], trainer)
  return ov_data.Tokenizer(
    backend, special={"pad": "<|endoftext|>", "bos": "<|startoftext|>", "eos": "<|endoftext|>"}
  )


TOKENIZERS = {
  "pieces": lambda: trained(kind="pieces"),
  "words": lambda: trained(kind="words"),
  "without accents": lambda: trained(kind="words", strip_accents=True),
  "bert": as_bert,
  "clip": as_clip,
}


def node(program: str, folder: pathlib.Path, *arguments: str) -> str:
  """Run an ES module next to copies of the page's modules; return its output."""
  for name in ("tokenizer", "preprocess"):
    shutil.copy(WEB / f"{name}.js", folder / f"{name}.mjs")
  (folder / "program.mjs").write_text(program, "utf-8")
  done = subprocess.run(
    [str(NODE), str(folder / "program.mjs"), *arguments],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_of_a_thousand_texts_equal_python(name, tmp_path):
  tokenizer = TOKENIZERS[name]()
  append_cls = tokenizer.cls_id is not None
  given = texts()
  assert len(given) == 1000
  ids = tokenizer.encode_batch(given, 24, append_cls)[0]
  words = {
    "length": 24, "append_cls": append_cls, "pad_id": tokenizer.pad_id,
    "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "cls_id": tokenizer.cls_id,
  }  # fmt: skip
  (tmp_path / "given.json").write_text(json.dumps([json.loads(tokenizer.to_json()), words, given]))
  program = """
    import { readFileSync } from "node:fs";
    import { Tokenizer } from "./tokenizer.mjs";
    const [content, words, texts] = JSON.parse(readFileSync(process.argv[2], "utf-8"));
    const tokenizer = new Tokenizer(content, words);
    const ids = texts.map((text) => [tokenizer.encode(text), tokenizer.pack(text)]);
    console.log(JSON.stringify(ids));
  """
  found = json.loads(node(program, tmp_path, str(tmp_path / "given.json")))
  wrong = [
    (text, tokenizer.encode(text), pieces)
    for text, row, (pieces, packed) in zip(given, ids.tolist(), found, strict=True)
    if packed != row or pieces != tokenizer.encode(text)
  ]
  assert not wrong, (len(wrong), wrong[:3])


def test_prompts_are_canonicalized_as_in_python(tmp_path):
  given = [text for text in texts() if "Σ" not in text]
  (tmp_path / "given.json").write_text(json.dumps(given))
  program = """
    import { readFileSync } from "node:fs";
    import { canonicalize } from "./tokenizer.mjs";
    const texts = JSON.parse(readFileSync(process.argv[2], "utf-8"));
    console.log(JSON.stringify(texts.map(canonicalize)));
  """
  found = json.loads(node(program, tmp_path, str(tmp_path / "given.json")))
  wrong = [(a, b) for a, b in zip(given, found) if canonicalise_text(a, ",") != b]
  assert not wrong, wrong[:3]


_RESIZE = """
  import { readFileSync, writeFileSync } from "node:fs";
  import { normalize, overWhite, resize } from "./preprocess.mjs";
  const jobs = JSON.parse(readFileSync(process.argv[2], "utf-8"));
  for (const { file, width, height, settings } of jobs) {
    const pixels = resize(overWhite(readFileSync(file)), width, height, settings);
    writeFileSync(file + ".out", pixels);
    writeFileSync(file + ".float", Buffer.from(normalize(pixels, settings).buffer));
  }
"""


def test_pixels_of_a_hundred_images_equal_python(tmp_path):
  rng = np.random.default_rng(0)
  jobs, expected = [], []
  drawn = probe.pictures(None, 100)
  for number in range(100):
    shape = tuple(rng.integers(3, 400, 2).tolist()) if number % 2 else None
    image = decode.full(drawn[number])
    image = image if shape is None else image.resize(shape)
    if number % 5 == 0:
      image.putalpha(Image.fromarray(rng.integers(0, 256, image.size[::-1], np.uint8)))
    size = int(rng.integers(8, 161))
    fit, way = ("center", "squash")[number % 3 > 0], ("bilinear", "bicubic")[number % 4 == 0]
    png = io.BytesIO()
    image.save(png, "PNG")
    expected.append(decode.whole(png.getvalue(), size, fit, interpolation=way))
    file = tmp_path / f"{number}.rgba"
    file.write_bytes(image.convert("RGBA").tobytes())
    settings = {"image_size": size, "fit": fit, "resample": way}
    settings |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    jobs.append(
      {"file": str(file), "width": image.width, "height": image.height, "settings": settings}
    )
  (tmp_path / "jobs.json").write_text(json.dumps(jobs))
  node(_RESIZE, tmp_path, str(tmp_path / "jobs.json"))
  unequal = total = 0
  for job, pixels in zip(jobs, expected, strict=True):
    found = np.fromfile(f"{job['file']}.out", np.uint8).reshape(pixels.shape)
    # Values next to an integer are truncated to either side: sums differ in the last float32 bit.
    difference = np.abs(found.astype(int) - pixels)
    assert difference.max() <= 1, job
    unequal, total = unequal + np.count_nonzero(difference), total + difference.size
    floats = np.fromfile(f"{job['file']}.float", np.float32).reshape(3, *pixels.shape[:2])
    values = (job["settings"][name] for name in ("mean", "std"))
    mean, std = (np.array(value, np.float32)[:, None, None] for value in values)
    want = (found.transpose(2, 0, 1).astype(np.float32) / 255 - mean) / std
    np.testing.assert_allclose(floats, want, atol=1e-6)  # of float32 values up to 4
  assert unequal / total < 1e-3, unequal / total
