"""Tests of caption words: changes made by tokenizers are ignored, in any script."""

import doctest
import unicodedata

import pytest

from ov_eval import caption_text
from ov_eval.caption_scores import bleu4, cider_scores
from ov_eval.caption_text import UNKNOWN, caption_words, compared_words, is_exact
from ov_eval.captions import CaptionRecord, attribute_accuracy, caption_statistics


def test_examples():
  assert doctest.testmod(caption_text).failed == 0


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("A  man\u2019s hat -- (red, blue) & 1,000 \uff41_b", "a man s hat red blue 1 000 a b"),
    ("Un CAFÉ à Düsseldorf, près de l'église.", "un café à düsseldorf près de l église"),
    ("एक लाल कुत्ता घास पर दौड़ रहा है।", "एक लाल कुत्ता घास पर दौड़ रहा है"),
    ("ঘাসের উপর একটি লাল কুকুর", "ঘাসের উপর একটি লাল কুকুর"),
    ("பச்சை புல்லில் சிவப்பு நாய்", "பச்சை புல்லில் சிவப்பு நாய்"),
    ("สีแดงวิ่ง", "สี แ ด ง วิ่ ง"),
    ("ဆိုင်ရာ", "ဆို င် ရာ"),
    ("東京タワー and iPhone手机", "東 京 タ ワ ー and iphone 手 机"),
    ("빨간 개", "빨간 개"),
    ("كلب أحمر، على العشب", "كلب أحمر على العشب"),
    ("ΟΔΟΣ straße Ⅳ ½", "οδοσ strasse iv 1 2"),
    ("I \u2764\ufe0f \U0001f600\U0001f600", "i \u2764 \U0001f600 \U0001f600"),
    ("zero\u200bwidth soft\u00adhyphen \u202bbidi", "zerowidth softhyphen bidi"),
    ("...", ""),
    ("", ""),
  ],
)
def test_words(text, words):
  assert caption_words(text) == unicodedata.normalize("NFKC", words).split()


@pytest.mark.parametrize(
  ("one", "other"),
  [
    ("The dog's ball isn't here", "the dog ' s ball isn ' t here"),
    ("a well-lit room at 10:30 for $3.50", "a well - lit room at 10 : 30 for $ 3. 50"),
    ("a “quoted” word…", 'a " quoted " word . . .'),
    ("東京タワーと赤い車。", "東 京 タワーと 赤 い 車 。"),
    ("½ price™", "1\u20442 pricetm"),
    ("Ǆ ﬁne \u212b", "ǆ fine å"),
    ("한국어", unicodedata.normalize("NFD", "한국어")),
    ("ᾳ", "\u03b1\u03b9"),
  ],
)
def test_spacing_case_and_unicode_forms_are_ignored(one, other):
  assert caption_words(one) == caption_words(other)
  assert is_exact(other, [one]) and is_exact(one, [other])


def test_marks_are_ignored_if_the_candidate_has_none():
  assert is_exact("un cafe a paris", ["Un café à Paris"])  # a tokenizer without accents
  assert is_exact("un café à paris", ["Un café à Paris"])
  assert not is_exact("un café a paris", ["Un café à Paris"])
  assert not is_exact("un café à paris", ["Un cafe a Paris"])
  hindi = "कुत्ता घास पर"
  without = "".join(
    c for c in unicodedata.normalize("NFKD", hindi) if unicodedata.category(c) != "Mn"
  )
  assert is_exact(without, [hindi]) and not is_exact("कुत्ती घास पर", [hindi])
  assert not is_exact("สิ สุ สา", ["สี สู สา"])


def test_unknown_token_never_matches():
  words, (truth,) = compared_words("a [UNK] dog, <unk>", ["a [UNK] dog"])
  assert words == ["a", UNKNOWN, "dog", UNKNOWN] and truth == ["a", "unk", "dog"]
  text = "[UNK] [UNK] [UNK] [UNK]"
  assert bleu4([text], [[text]]).sums[:8].tolist() == [0, 0, 0, 0, 4, 3, 2, 1]
  assert cider_scores([text, "a red dog runs"], [[text], ["a red dog runs"]]).tolist() == [0, 10]
  assert not is_exact(text, [text]) and not is_exact("[MASK]", ["a mask", "mask"])
  # A reference that contains the text "[unk]" matches a model that spells it.
  assert is_exact("the word [unk]", ["The word [UNK]"])


def test_captions_without_words_are_compared_literally():
  assert is_exact("! ?", ["!  ?"]) and not is_exact("!", ["?"]) and not is_exact("", ["a"])


def test_statistics_use_the_same_words_for_references():
  records = [
    CaptionRecord(0, "a man ' s well - lit room", ("A man's well-lit room",)),
    CaptionRecord(1, "a cat", ("A cat.",)),
    CaptionRecord(2, "A cat", ("a cat!",)),
  ]
  found = {r.name: r.value for r in caption_statistics(records)}
  assert found["caption_words"] == found["reference_words"] == 10 / 3
  assert found["distinct_captions"] == found["distinct_references"] == 2 / 3
  assert attribute_accuracy(records, lambda r: {}).exact_match.value == 1.0
