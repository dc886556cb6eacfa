import dataclasses
from html.parser import HTMLParser
import json
import re

from markdown_it import MarkdownIt
import pytest

from apps.exporter import card, plain_text, snippets
from apps.exporter.card import CardFacts
from apps.exporter.formats.table import EXPORTS
from ov_convert.release import Preprocess, Release, TokenizerSpec
import ov_models

# Markup of all kinds that Markdown could interpret.
EVIL = "a|b\nc\r\n# d <script>alert(1)</script> [x](javascript:y) `t` ```\n--- {{ 7 * 7 }} *e* &lt;"

VIT = ov_models.ViTConfig.from_name("mu/16", image_size=32)
WORDS = TokenizerSpec("{}", 16, True, 0, 1, 2, 3, 4)


def _pair(preset="openvision_released", kind="queries", **options):
  return ov_models.VisionLanguageConfig.from_names(
    "mu/16", "Ti", "Ti", image_size=32, vocab_size=100, text_len=16, caption_len=8,
    preset=preset, decoder_kind=kind, **options,
  )  # fmt: skip


def _captioner():
  return ov_models.VisionLanguageConfig.openvision2(
    "mu/16", "Ti", image_size=32, vocab_size=100, max_len=12
  )


def _release(config, words=WORDS, fit="center", dtype="float32"):
  return Release(config, {}, Preprocess(32, fit), words, dtype)


def _facts(kind="safetensors", config=None, **changes):
  facts = CardFacts(
    kind,
    _release(config or _pair()),
    "apache-2.0",
    about={
      "step": 500,
      "stage": "main",
      "fingerprint": "f43c2dea",
      "versions": {"jax": "0.10.2", "numpy": EVIL},
      "config": {
        "batch_size": 64,
        "total_steps": 500,
        "stages": [],
        "optimizer": {"learning_rate": 0.002, "decay_regex": "(^|/)kernel$"},
        "model": {"encoder": "mu/16", "token_len": 16, "text": EVIL},
        "input": {
          "data_dir": "/srv/disk7/anna/laion",
          "caption_keys": ["txt", "llava_caption"],
          "sources": [{"path": "gs://anna-bucket/deep/coco", "weight": 2.0}],
        },
      },
    },
    tokenizer="72c8aa6b",
    results=(
      {
        "name": "zero_shot_top1", "value": 0.98125, "count": 640, "unit": "share",
        "interval": [0.9675, 0.9892], "split": "heldout",
        "context": {"evaluator": "zero_shot", "classes": "/srv/disk7/anna/classes.json"},
      },
      {
        "name": "caption_nll", "value": None, "count": 512, "unit": "nats", "interval": None,
        "split": EVIL, "context": {"evaluator": "likelihood", "note": EVIL},
      },
    ),
    parity={
      "date": "2026-11-25", "pictures": 4, "texts": ["a", "b"], "versions": {"timm": "1.0.31"},
      "rows": [
        {"name": "image/block_00", "max_abs": 1.25e-7, "cosine": 0.9999999, "tolerance": 1e-4,
         "problem": "", "ok": True},
        {"name": "text/ids", "max_abs": None, "cosine": None, "tolerance": 0.0,
         "problem": EVIL, "ok": False},
      ],
    },
  )  # fmt: skip
  return dataclasses.replace(facts, **changes)


def _outside_fences(page):
  """Return the page without its header and fenced blocks."""
  body = page.split("---\n", 2)[2]
  return re.sub(r"^(`{3,})\w.*?^\1[ \t]*$", "", body, flags=re.MULTILINE | re.DOTALL)


def _tables(page):
  """Return the rows of cells of all tables."""
  rows, tables = [], []
  for line in [*_outside_fences(page).splitlines(), ""]:
    if line.startswith("|"):
      assert line.endswith("|")
      cells = re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]
      rows.append([text.strip() for text in cells])
    elif rows:
      tables.append(rows)
      rows = []
  return tables


def _header(page):
  """Parse the YAML header, which has lines key: value and a list of tags."""
  assert page.startswith("---\n")
  found = {}
  for line in page.split("---\n", 2)[1].splitlines():
    if line.startswith("- "):
      found["tags"].append(line[2:])
      continue
    key, value = re.fullmatch(r"([a-z_]+):(?: (.+))?", line).groups()
    found[key] = [] if key == "tags" else value
  return found


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize("config", [_pair(), _captioner(), VIT], ids=["pair", "captioner", "vit"])
def test_every_table_has_as_many_cells_in_each_row(kind, config):
  page = card.render(_facts(kind, config))
  tables = _tables(page)
  assert len(tables) == 5  # parts, model, training, evaluation, agreement
  for table in tables:
    assert {len(row) for row in table} == {len(table[0])}
    assert all(set(cell) == {"-"} for cell in table[1])


def test_the_header_has_the_required_fields():
  assert _header(card.render(_facts("open_clip"))) == {
    "license": "apache-2.0",
    "library_name": "open_clip",
    "pipeline_tag": "zero-shot-image-classification",
    "tags": ["openvision", "vision", "clip"],
  }


@pytest.mark.parametrize(
  "kind, config, library, task",
  [
    ("safetensors", _pair(), "openvision", "zero-shot-image-classification"),
    ("safetensors", _captioner(), "openvision", "image-to-text"),
    ("safetensors", VIT, "openvision", "image-feature-extraction"),
    ("timm", _pair(), "timm", "image-feature-extraction"),
    ("timm", _captioner(), "timm", "image-feature-extraction"),
    ("transformers", _pair(), "transformers", "image-feature-extraction"),
    ("onnx", _pair(), "onnx", "zero-shot-image-classification"),
    ("stablehlo", VIT, None, "image-feature-extraction"),
  ],
)
def test_library_and_task_of_each_format(kind, config, library, task):
  header = _header(card.render(_facts(kind, config)))
  assert header.get("library_name") == library
  assert header["pipeline_tag"] == task


def test_a_malicious_licence_cannot_add_lines_to_the_header():
  header = _header(card.render(_facts(license="Mine\nlibrary_name: x: |")))
  assert header["license"] == "other"
  assert json.loads(header["license_name"]) == "Mine\nlibrary_name: x: |"
  page = card.render(_facts(license=""))
  assert "license" not in _header(page) and "No licence is stated." in page


class _Html(HTMLParser):
  """Tags with their attributes, and the text of each cell, line or heading."""

  def __init__(self, page):
    super().__init__()
    self.tags, self.texts = [], []
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    self.feed(parser.render(page.split("---\n", 2)[2]))

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag in ("td", "th", "li", "p", "h1", "h2", "h3"):
      self.texts.append("")

  def handle_data(self, data):
    if self.texts:
      self.texts[-1] += data


def test_values_from_data_are_escaped():
  plain = _Html(card.render(_facts("onnx", VIT, results=(), parity={}, about={})))
  allowed = {tag for tag, _ in plain.tags} | {"details", "summary", "td", "tr", "tbody"}
  shown = " ".join(EVIL.replace("\r", " ").split())
  for facts in (_facts(), _facts(about={"imported": {"from": EVIL, "notes": [EVIL]}})):
    page = _Html(card.render(facts))
    assert {tag for tag, _ in page.tags} <= allowed
    attributes = [value for tag, found in page.tags for value in found.values()]
    assert all(v.startswith(("https://arxiv.org/abs/", "language-")) for v in attributes)
    texts = [" ".join(text.split()) for text in page.texts]
    assert shown in texts  # the data is a complete cell or line, character by character


@pytest.mark.parametrize(
  "note", ["# x", "- x", "+ x", "1. x", "2) x", "===", "---", "> x", "    x"]
)
def test_a_line_that_begins_like_markup_is_text(note):
  page = _Html(card.render(_facts(about={"imported": {"notes": [note]}})))
  plain = _Html(card.render(_facts(about={"imported": {"notes": ["x"]}})))
  assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
  assert note.strip() in [text.strip() for text in page.texts]


def test_the_configuration_is_literal_even_where_it_holds_fences():
  config = {"a": "```", "b": "`````", "c": "\n```\n</details>"}
  page = card.render(_facts(about={"config": config}))
  block = re.search(r"^(`{3,})text\n(.*?)\n\1$", page, re.MULTILINE | re.DOTALL)
  assert len(block[1]) == 6
  shown = dict(line.split(": ", 1) for line in block[2].splitlines())
  assert {name: json.loads(value) for name, value in shown.items()} == config


def test_local_paths_are_not_published():
  page = card.render(_facts())
  assert not re.search(r"srv|disk7|anna|bucket|deep", page)
  assert "| data | laion |" in page
  assert 'input.sources: [{"path": "coco", "weight": 2.0}]' in page
  assert "classes classes.json" in page
  # Text that only looks like a path is kept.
  assert 'optimizer.decay_regex: "(^|/)kernel$"' in page
  assert "| image tower | mu/16 |" in page


@pytest.mark.parametrize(
  "key", ["token", "hf_token", "HF_TOKEN", "api_key", "apikey", "wandbApiKey", "password", "secret",
          "client_secret", "access-key", "credentials"],
)  # fmt: skip
def test_secrets_are_hidden_by_their_key(key):
  page = card.render(
    _facts(about={"config": {"x": {key: "swordfish"}, "l": [{key: {"k": "s3a"}}]}})
  )
  assert "swordfish" not in page and "s3a" not in page
  assert page.count(plain_text.HIDDEN) == 2


def test_the_training_section():
  training = dict(_tables(card.render(_facts()))[2][2:])
  assert training["step"] == "500" and training["samples seen"] == "32,000"
  assert training["learning rate"] == "2e-3"
  assert training["captions"] == "txt, llava_caption"
  assert training["fingerprint of the tokenizer"] == "72c8aa6b"
  # Stages have different batch sizes, so samples cannot be computed.
  facts = _facts(results=())
  facts.about["config"]["stages"] = [{"batch_size": 8}]
  assert "samples seen" not in card.render(facts)
  facts.about["examples_seen"] = 77
  assert "| samples seen | 77 |" in card.render(facts)


def test_results_and_agreement_are_shown():
  page = card.render(_facts())
  tables = _tables(page)
  assert tables[3][2][:6] == [
    "zero shot", "heldout", "Zero-shot top-1", "98.1%", "96.8 – 98.9%", "640",
  ]  # fmt: skip
  assert tables[3][3][3:6] == ["–", "", "512"]
  assert tables[4][2] == ["image/block_00", "1.2e-07", "0.9999999", "0.0001", "yes"]
  assert tables[4][3][:4] == ["text/ids", "not finite", "", "0"]
  assert tables[4][3][4].startswith("a\\|b c")
  assert "timm 1.0.31" in page and "4 images and 2 texts, on 2026-11-25" in page


def test_unknown_facts_are_stated():
  page = card.render(CardFacts("timm", _release(VIT, None), "mit"))
  assert "The training of this model is unknown." in page
  assert "This checkpoint was not evaluated." in page and "Not compared." in page
  page = card.render(_facts(about={"imported": {"from": "timm:/a/vit_b16", "notes": ["no head"]}}))
  assert "Imported from timm:vit_b16;" in page and "- no head" in page


def test_parts_and_sizes_are_those_of_the_model():
  config = _pair()
  page = card.render(_facts(config=config))
  parts = _tables(page)[0][2:]
  assert [row[0] for row in parts[:3]] == ["image tower", "text tower", "caption decoder"]
  counted = sum(int(row[5].replace(",", "")) for row in parts)
  assert counted == ov_models.num_params(config)
  assert "# OpenVision mu/16, 32 px" in page
  # Sizes of no known variant are spelled out.
  odd = dataclasses.replace(VIT, width=64, num_heads=4)
  assert "ViT of width 64 and 1 layers, patch 16, 32 px" in card.render(_facts("timm", odd))


def test_omitted_parts_are_stated():
  page = card.render(_facts("timm"))
  assert "The image tower of an OpenVision model" in page
  assert "the text tower and caption decoder of the model" in page
  page = card.render(_facts("open_clip"))
  assert "The image tower and text tower of" in page and "the caption decoder of" in page
  assert "Not included" not in card.render(_facts("safetensors"))


def test_unexpected_behavior_is_stated():
  text = _pair()
  assert "has one word and zero weights" in card.render(_facts("open_clip", VIT))
  assert "zero weights" not in card.render(_facts("open_clip", text))
  assert "HTML entities" in card.render(_facts("open_clip", text))
  masked = card.render(_facts("open_clip", _pair("default")))
  assert r"padded with \[eos\]" in masked
  assert "padded with" not in card.render(_facts("open_clip", text)).split("## Model")[0]
  assert "BEiT" in card.render(_facts("transformers", VIT))
  half = dataclasses.replace(_facts(), release=_release(text, dtype="bfloat16"))
  assert "files contain bfloat16" in card.render(half)
  assert "files contain" not in card.render(_facts())


RELEASES = {
  "pair": _release(_pair()),
  "pair that writes": _release(_pair(kind="teacher_forced"), fit="squash"),
  "sigmoid": _release(_pair("default", bias_init=-10.0)),
  "clip": _release(_pair("clip"), dataclasses.replace(WORDS, append_cls=False)),
  "captioner": _release(_captioner()),
  "no tokenizer": _release(_pair(), None),
  "vit": _release(VIT, None),
}


@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize("kind", EXPORTS)
def test_every_program_is_valid_python_with_folder_and_image(kind, name):
  release = RELEASES[name]
  page = card.render(CardFacts(kind, release, "mit"))
  found = snippets.extract(page)
  assert [code for _, _, code in found] == [s.code for s in snippets.snippets(kind, release)]
  assert {library for _, library, _ in found} == (
    {"safetensors", "torch"} if kind == "safetensors" else {kind}
  )
  for language, library, code in found:
    assert language == "python"
    compile(code, f"{kind}, {library}", "exec")
    assert f'"{snippets.FOLDER}"' in code or f":{snippets.FOLDER}" in code
    assert f'"{snippets.PICTURE}"' in code
    assert max(map(len, code.splitlines())) <= 100


def test_programs_depend_on_the_parts_of_the_model():
  def shown(kind, name):
    return "".join(program.code for program in snippets.snippets(kind, RELEASES[name]))

  for kind in ("open_clip", "onnx", "stablehlo", "safetensors", "transformers"):
    assert "a photo of a dog" in shown(kind, "pair")
    assert "a photo of a dog" not in shown(kind, "captioner") + shown(kind, "no tokenizer")
  assert "generate(" in shown("safetensors", "captioner")
  assert "generate(" in shown("safetensors", "pair that writes")
  assert "generate(" not in shown("safetensors", "pair")  # its decoder is not autoregressive
  for kind in ("open_clip", "onnx", "safetensors", "transformers"):
    assert ("softmax" in shown(kind, "pair")) == (kind != "onnx")
    assert "softmax" not in shown(kind, "sigmoid")
  assert "attention_mask=mask" in shown("transformers", "sigmoid")
  assert "attention_mask=" not in shown("transformers", "pair")
  assert "CLIPTextModelWithProjection" in shown("transformers", "clip")
  for kind in ("open_clip", "timm", "transformers", "onnx", "stablehlo"):
    assert "def read_picture(path, side=32):" in shown(kind, "pair")
    assert "box = (0, 0, width, height)" in shown(kind, "pair that writes")
    assert "box = (left * across" in shown(kind, "pair")


def test_the_card_is_written_next_to_the_weights(tmp_path):
  card.write_card(tmp_path, _facts())
  assert (tmp_path / "README.md").read_text("utf-8") == card.render(_facts())


@pytest.mark.parametrize("kind", ["timm", "transformers", "onnx", "stablehlo", "safetensors"])
@pytest.mark.parametrize("position", ["sincos2d", "learned"])
def test_the_card_describes_other_resolutions(kind, position):
  config = ov_models.ViTConfig.from_name("mu/16", image_size=32, position=position)
  page = card.render(CardFacts(kind, Release(config, {}, Preprocess(32, "center")), "mit"))
  own = kind == "safetensors" and position == "sincos2d"
  assert ("export the run again with --image_size" in page) == (not own)
  assert ("the models take any size" in page) == own
  cosine = {"sincos2d": "cosine 0.96 ", "learned": "cosine 0.99999 "}[position]
  assert (cosine in page) == (kind in ("timm", "transformers"))


def test_the_card_says_the_opset():
  release = Release(ov_models.ViTConfig.from_name("mu/16", image_size=32), {}, Preprocess(32))
  page = card.render(CardFacts("onnx", release, "mit", parity={"opset": 19}))
  assert "version 19 of the ONNX operators" in page


def test_a_fine_tuned_import_states_its_source_and_its_training():
  about = {
    "imported": {"from": "timm:vit_b16", "notes": ["no head"], "license": "cc-by-nc-4.0"},
    "config": {"batch_size": 64},
    "step": 100,
    "wise_ft": 0.5,
  }
  page = card.render(_facts(about=about))
  assert "Fine-tuned from timm:vit_b16; see there" in page
  assert "| batch size | 64 |" in page and "The training of this model is unknown" not in page
  assert "WiSE-FT" in page and "| 0.5 |" in page


def test_the_accuracy_of_smaller_weights_is_shown():
  accuracy = {
    "count": {"image": 64, "text": 60}, "min_cosine": {"image": 0.98765, "text": 0.99},
    "mean_cosine": {"image": 0.995, "text": 0.996}, "overlap": 0.8125,
    "zero_shot_agreement": 0.96875, "size": 30_000_000, "float32_size": 120_000_000,
    "speed": {"image": 1.5, "text": 0.75},
  }  # fmt: skip
  page = card.render(_facts("onnx", VIT, parity={"weights": "int8", "accuracy": accuracy}))
  for line in (
    "| dtype of the files | int8 |",
    "| smallest cosine of 64 image embeddings | 0.98765 |",
    "| mean cosine of the text embeddings | 0.99600 |",
    "| overlap of the 10 nearest images | 81.2% |",
    "| images with the same zero-shot class, out of 60 texts | 96.9% |",
    "| size of the graphs | 25% of 120.0 MB |",
    "| speed of the text tower on the exporting CPU | 0.75x |",
  ):
    assert line in page
  assert "have 8 bits per weight" in page
  assert "were then converted" not in card.render(_facts("onnx", VIT, parity={}))
