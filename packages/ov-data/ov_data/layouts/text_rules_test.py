import pytest

from ov_data.layouts import text_rules
from ov_data.layouts.items import Notes, clean_captions, name_problem


@pytest.mark.parametrize(
  ("data", "text"),
  [
    (b"plain", "plain"),
    (b"\xef\xbb\xbfmarked", "marked"),
    ("caf\u00e9".encode("latin-1"), "caf\udce9"),
    ("ä b".encode("utf-16"), "ä b"),  # with its byte order mark
    (b"", ""),
  ],
)
def test_decode(data: bytes, text: str):
  assert text_rules.decode(data) == text


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("cut \ud83d", "cut \ufffd"),
    ("\U0001f600 \udc00", "\U0001f600 \ufffd"),
    ("caf\udce9", "caf\ufffd"),
    ("emoji \udcf0\udc9f\udc98 cut", "emoji \ufffd cut"),  # an incomplete character
    ("\udcff\udcfe", "\ufffd\ufffd"),
    ("a\0b", "a\ufffdb"),
    ("fine é", "fine é"),
  ],
)
def test_captions_are_repaired(text: str, expected: str):
  assert text_rules.repaired(text) == expected
  assert text_rules.repaired(text).encode()


@pytest.mark.parametrize(
  ("label", "expected"),
  [
    ("dress ", "dress"),
    ("a\nb", "a b"),
    ("a\r\n\u2028 b\x85c\x0bd", "a b c d"),
    ("\ufeffhat", "hat"),
    ("caf\udce9", "caf\\xe9"),
    ("x\ud83d\0", "x\\ud83d\\x00"),
    (" \t\n", ""),
    ("犬", "犬"),
  ],
)
def test_labels_are_one_line(label: str, expected: str):
  assert text_rules.label_text(label) == expected
  assert len(f"{expected}\n".splitlines()) == 1 and expected.encode().decode() == expected


def test_printable_escapes_control_characters():
  assert text_rules.printable("Käse/\udcff\n\0\x1b[31m.jpg") == "Käse/\\xff\\n\\x00\\x1b[31m.jpg"
  assert text_rules.printable("a\u2028b\u202egpj") == "a\\u2028b\\u202egpj"
  assert text_rules.printable("família 👨\u200d👩") == "família 👨\u200d👩"


def test_clean_captions_counts_changes():
  notes = Notes()
  captions = clean_captions([" a ", "a", "", "?!", "cut \ud83d"], "k", notes)
  assert captions == ("a", "?!", "cut \ufffd")  # punctuation is a valid caption
  assert notes.counts == {
    "repeated captions of one image": 1,
    "empty captions": 1,
    "captions repaired (invalid characters became U+FFFD)": 1,
  }
  with pytest.raises(text_rules.TextError, match="unreadable caption"):
    clean_captions(["\udcff\udcfe"], "k", notes)
  with pytest.raises(text_rules.TextError, match="caption too long: 1,048,578 bytes"):
    clean_captions(["é" * (1 << 19) + "ab"], "k", notes)
  assert clean_captions(["é" * (1 << 19)], "k", notes)


def test_one_unusable_caption_does_not_affect_others():
  notes = Notes()
  too_long = "x" * (text_rules.MAX_CAPTION_BYTES + 1)
  assert clean_captions(["a", "\ud83d", too_long, "b"], "k", notes) == ("a", "b")
  assert notes.counts == {
    "captions dropped next to others of their image (unreadable caption)": 1,
    "captions dropped next to others of their image (caption too long)": 1,
  }


@pytest.mark.parametrize(
  ("name", "problem"),
  [
    ("a/b.jpg", None),
    ("caf\udce9.jpg", None),
    ("a..b/c.jpg", None),
    ("../a.jpg", "path outside the folder"),
    ("a\\..\\..\\b.jpg", "path outside the folder"),
    ("/etc/passwd", "path outside the folder"),
    ("C:x.jpg", "path outside the folder"),
    ("gs://bucket/a.jpg", "path outside the folder"),
    ("a\0.jpg", "name with a NUL character"),
    ("a\ud83d.jpg", "name that no file can have"),
  ],
)
def test_names_in_lists(name: str, problem: str | None):
  assert name_problem(name) == problem


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a": ' + b"1" * 5000 + b"}", "more than 4300 digits"),
    (b'{"a": 1},', "Extra data at character 9.*write one object per line"),
    (b'[{"a": 1},', "write one object per line"),
    (b"\x1f\x8b\x08", r"begins with b'\\x1f.*another file format"),
    (b"version https://git-lfs.github.com/spec/v1", "begins with b'version https"),
    (b'{"captions": ["a"], "captions": ["b"]}', 'has "captions" twice'),
    (b'{"a"', "is the file complete"),
    ("{}".encode("utf-16"), "save it as UTF-8"),
  ],
)
def test_json_that_cannot_be_used(data: bytes, message: str):
  with pytest.raises(ValueError, match=rf"^here: .*{message}"):
    text_rules.parse_json(data, "here")


def test_keys_that_are_not_read_may_be_repeated():
  assert text_rules.parse_json(b'{"exif": 1, "exif": 2, "caption": "a"}', "here")["caption"] == "a"


def test_lines_with_a_byte_order_mark_alone_are_empty():
  assert list(text_rules.json_lines([b"\xef\xbb\xbf\r\n", b'{"a": 1}'], "f")) == [
    ("f, line 2", {"a": 1})
  ]


@pytest.mark.parametrize("label", [True, 1.5, float("nan"), ["a"], {"a": 1}])
def test_labels_of_wrong_type(label: object):
  with pytest.raises(ValueError, match='^here: expected "label": "name" or an integer, found'):
    text_rules.listed_label({"label": label}, "here")
  assert text_rules.listed_label({"label": 7}, "here") == "7"
