import pytest

from apps.exporter.plain_text import HIDDEN, cell, clean

# In two parts, so that secret scanners do not report it.
SECRET = "hf_" + "abcdefgh" * 4


@pytest.mark.parametrize(
  "value, expected",
  [
    ("/a/b/c", "c"),
    ("/a/b/c/", "c"),
    ("~/x/y", "y"),
    ("../x/y*", "y*"),
    ("gs://bucket/x/y@8", "y@8"),
    ("https://user:pass@host/x", "x"),
    (r"C:\Users\anna\data", "data"),
    ("/a/anna b/c d", "c d"),
    ("train=/a/b, test=/a/c", "train=b, test=c"),
    ("one/two", "one/two"),
    ("^encoder/", "^encoder/"),
  ],
)
def test_a_place_keeps_its_last_name_only(value, expected):
  assert clean({"x": [value]}) == {"x": [expected]}


def test_a_relative_place_under_a_telling_key_keeps_its_last_name_only():
  assert clean({"data_dir": "anna/laion", "include": "one/two"}) == {
    "data_dir": "laion",
    "include": "one/two",
  }


@pytest.mark.parametrize(
  "key", ["token_len", "tokenizer", "image_key", "caption_keys", "num_tokens"]
)
def test_values_that_only_resemble_secrets_are_kept(key):
  assert clean({key: "shown"}) == {key: "shown"}


def test_secrets_are_hidden_by_their_look():
  key = "AKIA" + "ABCDEFGH" * 2
  assert clean(["x " + SECRET, {"note": key}]) == [HIDDEN, {"note": HIDDEN}]


def test_unset_secrets_are_shown_as_unset():
  assert clean({"token": "", "password": None}) == {"token": "", "password": None}


@pytest.mark.parametrize(
  "value, expected",
  [
    (172800, "172,800"),
    (0.002, "2e-3"),
    (True, "True"),
    ("img2txt_r1", "img2txt_r1"),
    ("_a_ *b* ~c~", r"\_a\_ \*b\* \~c\~"),
    ("a|b", r"a\|b"),
    ("a\\|b", r"a\\\|b"),
    ("a\nb\u2028c\x00", "a b c"),
    ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
    ("98.1%", "98.1%"),
    ("-1.5", "-1.5"),
    ("12. x", r"12\. x"),
  ],
)
def test_a_cell_holds_text_only(value, expected):
  assert cell(value) == expected
