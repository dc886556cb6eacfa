"""Tests of class names and templates: canonical texts, named sets, files and errors."""

import json
import string
import sys

import pytest

from ov_eval.classes import ClassSet, TemplateSet, class_set, class_texts, template_set


@pytest.mark.parametrize(
  "name, template, expected",
  [
    # The full stop of a template is removed, `{}` is kept.
    ("dog", "a bad photo of a {}.", "a bad photo of a dog"),
    # A hyphen is removed without a space.
    ("T-Shirt", "a close-up photo of the {}.", "a closeup photo of the tshirt"),
    # An underscore becomes a space, spaces are collapsed, the comma of a name is kept.
    ("hen,  of_the Woods ", "itap of a  {}!", "itap of a hen, of the woods"),
    # The comma of a template is removed.
    ("jack-o'-lantern", "a {}, in_a video game.", "a jackolantern in a video game"),
    # Braces in a name are punctuation, not a placeholder.
    ("cat {}", "{}", "cat"),
    # Non-ASCII punctuation is kept.
    ("Crème Brûlée", "“{}”", "“crème brûlée”"),
    ("dog", "{} and {}", "dog and dog"),
  ],
)
def test_canonical_texts_equal_the_released_code(name, template, expected):
  assert class_texts([name, "other"], [template])[0] == expected


def _slowly(text, kept):
  """Canonicalise character by character, as the released OpenVision code; `kept` is preserved."""
  out = ""
  for character, keep in zip(text, kept, strict=True):
    if character == "_":
      out += " "
    elif keep or character not in string.punctuation:
      out += character.lower()
  return " ".join(out.split())


def test_every_ascii_character():
  everything = "".join(map(chr, range(32, 127)))
  name = _slowly(everything, [c == "," for c in everything])
  assert class_texts([everything, "b"], ["{}"])[0] == name
  template = everything.replace("{", "").replace("}", "") + "{}" + everything[::-1]
  marks = [False] * (len(everything) - 2) + [True] * 2 + [False] * len(everything)
  expected = _slowly(template, marks).replace("{}", "b")
  assert class_texts(["b", "c"], [template])[0] == expected


def test_texts_are_ordered_by_class_then_template():
  texts = class_texts(ClassSet("pets", ("Cat", "Dog")), TemplateSet("two", ("{}", "a {}.")))
  assert texts == ["cat", "a cat", "dog", "a dog"]
  assert class_texts(["Cat", "Dog"], ["a {}."], canonical=False) == ["a Cat.", "a Dog."]


@pytest.mark.parametrize(
  "name, count, first, hash",
  [
    ("plain", 1, "{}", "06d303a9b27b"),
    ("photo", 1, "a photo of a {}", "e9de978cb2b2"),
    ("openai_best", 8, "itap of a {}.", "100d7841c7d7"),
  ],
)
def test_hashes_of_named_sets(name, count, first, hash):
  # Result files identify a set by its hash; a changed text under the same name must change it.
  found = template_set(name)
  assert (len(found.templates), found.templates[0], found.hash) == (count, first, hash)


def _install(monkeypatch, folder, content):
  """Fake open_clip of which only the metadata module can be loaded."""
  package = folder / "open_clip"
  package.mkdir(parents=True)
  (package / "__init__.py").write_text("raise AssertionError('the package must not be imported')")
  (package / "zero_shot_metadata.py").write_text(content)
  monkeypatch.syspath_prepend(folder)


def test_sets_from_open_clip(monkeypatch, tmp_path):
  content = """
OPENAI_IMAGENET_TEMPLATES = tuple(lambda c, i=i: f"photo {i} of a {c}." for i in range(80))
IMAGENET_CLASSNAMES = [f"name {i}" for i in range(1000)]
"""
  _install(monkeypatch, tmp_path, content)
  eighty, more = template_set("openai_80"), template_set("openvision_81")
  assert eighty.templates == tuple(f"photo {i} of a {{}}." for i in range(80))
  assert more.templates == (*eighty.templates, "{}") and more.hash != eighty.hash
  classes = class_set("imagenet")
  assert classes.classes == tuple(f"name {i}" for i in range(1000)) and classes.name == "imagenet"
  texts = class_texts(classes, more)
  assert len(texts) == 81_000
  assert texts[81 * 999 + 79] == "photo 79 of a name 999" and texts[-1] == "name 999"


def test_open_clip_with_other_lists(monkeypatch, tmp_path):
  _install(monkeypatch, tmp_path, "OPENAI_IMAGENET_TEMPLATES = (lambda c: f'a {c}',) * 79")
  with pytest.raises(ValueError, match="has 79 templates for 'openai_80', expected 80"):
    template_set("openai_80")
  with pytest.raises(ValueError, match="'imagenet' requires open_clip.*pass a file"):
    class_set("imagenet")  # the attribute is missing
  names = tmp_path / "open_clip" / "zero_shot_metadata.py"
  names.write_text(
    "IMAGENET_CLASSNAMES = ['a', 'b', 'c']  # another size, so the cached bytecode is not used"
  )
  with pytest.raises(ValueError, match="has 3 class names for 'imagenet', expected 1000"):
    class_set("imagenet")


@pytest.mark.parametrize("read", [lambda: template_set("openai_80"), lambda: class_set("imagenet")])
def test_error_without_open_clip(monkeypatch, read):
  monkeypatch.setitem(sys.modules, "open_clip", None)  # as if it were not installed
  with pytest.raises(ValueError, match="pip install --no-deps open_clip_torch"):
    read()


def test_open_clip_sets_do_not_import_pytorch(monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)  # importing it would fail
  classes, eighty, more = (
    class_set("imagenet"),
    template_set("openai_80"),
    template_set("openvision_81"),
  )
  # Counts and hashes of the lists of open_clip 3.3.0, computed from an imported open_clip.
  assert (len(classes.classes), classes.hash) == (1000, "6ef5246539bb")
  assert (len(eighty.templates), eighty.hash) == (80, "e30aa9d7fb28")
  assert (len(more.templates), more.hash) == (81, "ad137a297e9b")
  assert (classes.classes[0], classes.classes[-1]) == ("tench", "toilet paper")


@pytest.mark.parametrize(
  ("name", "data", "expected"),
  [
    ("a.txt", "tench\n  goldfish \ncr\u00e8me\n".encode(), ("tench", "goldfish", "crème")),
    ("a.txt", b"one\r\ntwo\rthree", ("one", "two", "three")),
    ("a.txt", b"\xef\xbb\xbfone\ntwo\n\n \n", ("one", "two")),  # byte order mark, end of file
    # Characters that some programs treat as line ends are whitespace within a name.
    ("a.txt", "one\u2028more\ntwo\x0b words\n".encode(), ("one more", "two words")),
    ("a.txt", b"crane\nlemur\ncrane\n", ("crane", "lemur", "crane")),  # ImageNet has such
    ("a.json", b'\xef\xbb\xbf["one", " two\\nwords "]', ("one", "two words")),
  ],
)
def test_class_files_are_one_to_one_with_class_numbers(tmp_path, name, data, expected):
  path = tmp_path / name
  path.write_bytes(data)
  assert class_set(str(path)).classes == expected


def test_templates_from_a_file(tmp_path):
  listed = tmp_path / "templates.json"
  listed.write_text(json.dumps(["a {}", " the {}"]))
  found = template_set(str(listed))
  assert found.templates == ("a {}", "the {}") and found.name == str(listed)
  assert found.hash == TemplateSet("another name", found.templates).hash


@pytest.mark.parametrize("read", [class_set, template_set])
@pytest.mark.parametrize(
  ("name", "data", "message"),
  [
    ("a.txt", b"a {}\n\nb {}\n", "line 2 is empty.*add a name, or remove the entry"),
    ("a.txt", b"\na {}\nb {}\n", "line 1 is empty"),
    ("a.txt", b"a {}\r\nb {}\r\n \t\r\nc {}", "line 3 is empty"),
    (
      "a.txt",
      b"a {}\nb {}\ncr\xe8me {}\n",
      "line 3: byte 0xe8 is not UTF-8; save the file as UTF-8",
    ),
    ("a.txt", b"\xff\xfea\0\n\0", "line 1: byte 0xff is not UTF-8"),
    ("a.json", b'["a {}", "", "b {}"]', "entry 1 is empty"),
    ("a.json", b'["a {}", "\\n", "b {}"]', "entry 1 is empty"),
    ("a.json", b'["a {}", 7]', "entry 1: expected a text in quotes, got int"),
    ("a.json", b'["a {}", "\xe8"]', "line 1: byte 0xe8 is not UTF-8"),
    ("a.json", b"[" * 100_000, "nested too deeply"),
  ],
)
def test_malformed_lists(tmp_path, read, name, data, message):
  path = tmp_path / name
  path.write_bytes(data)
  with pytest.raises(ValueError, match=message) as error:
    read(str(path))
  assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "read, content, message",
  [
    (template_set, None, "neither a set of templates .plain, photo, .*, openvision_81. nor a file"),
    (class_set, None, "neither a set of classes .imagenet. nor a file"),
    (class_set, "[1, 2]", "entry 0: expected a text in quotes, got int"),
    (class_set, '{"a": 1}', "expected a JSON list of texts, got dict"),
    (class_set, "[", "is not JSON"),
    (class_set, '["one"]', "has 1 classes; expected at least two"),
    (class_set, '["one", " "]', "entry 1 is empty"),
    (template_set, "[]", "has no templates"),
    (template_set, '["a {}", "a photo"]', "'a photo' .*has no {}"),
  ],
)
def test_invalid_files(tmp_path, read, content, message):
  path = tmp_path / "list.json"
  if content is not None:
    path.write_text(content)
  with pytest.raises(ValueError, match=message) as error:
    read(str(path))
  assert str(path) in str(error.value)


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (["C++", "C#", "C", "Java"], "classes 'C.*', 'C#', 'C' are all 'c' in lower case and without"),
    (["Dog", "dog"], "classes 'Dog', 'dog' are all 'dog'"),
    (["hot_dog", "hot dog"], "are all 'hot dog'"),
    (["T-shirt", "tshirt"], "are all 'tshirt'"),
    (["dog", "!!!"], "class '!!!' has no letter or digit"),
    (["dog", "_,"], "class '_,' has no letter or digit"),
  ],
)
def test_names_with_equal_canonical_texts(names, message):
  with pytest.raises(ValueError, match=message) as error:
    class_texts(names, ["a photo of a {}"])
  assert "\n" not in str(error.value)
  assert class_texts(names, ["{}"], canonical=False) == list(ClassSet("x", tuple(names)).classes)


def test_equal_names_are_allowed():
  assert class_texts(["Crane", "dog", "Crane"], ["a {}"]) == ["a crane", "a dog", "a crane"]
