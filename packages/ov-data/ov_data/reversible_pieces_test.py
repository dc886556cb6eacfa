"""Round trips of tokenizers trained on custom captions, in several scripts."""

import string
import unicodedata

import numpy as np
import pytest

from ov_data.reversible_pieces import JOINER, MAX_WORD_CHARS
from ov_data.tokenizer import Tokenizer

_TEXTS = {
  "English": "The dog's ball isn't on the well-lit mat; it costs $3.50 (or \"€4\") at 10:30!",
  "French": "Un café à Düsseldorf, près de l'église : « déjà vu »…",
  "Vietnamese": "Một con chó màu đỏ chạy trên bãi cỏ xanh",
  "Greek": "ένα κόκκινο σκυλί τρέχει στο γρασίδι ΟΔΟΣ",
  "Russian": "Красная собака бежит по зелёной траве – ещё одна",
  "Hebrew": "כלב אדום רץ על הדשא בְּרֵאשִׁית",
  "Arabic": "كلبٌ أحمر، يركض على العشب الأخضر",
  "Persian": "سگ قرمز می\u200cدود روی چمن",
  "Hindi": "एक लाल कुत्ता घास पर दौड़ रहा है।",
  "Bengali": "ঘাসের উপর একটি লাল কুকুর দৌড়াচ্ছে",
  "Tamil": "பச்சை புல்லில் சிவப்பு நாய் ஓடுகிறது",
  "Thai": "สุนัขสีแดงวิ่งบนหญ้า น้ำใสที่ทะเล",
  "Khmer": "ឆ្កែក្រហមកំពុងរត់លើស្មៅ",
  "Burmese": "ခွေးနီတစ်ကောင် မြက်ပေါ်မှာ ပြေးနေတယ်",
  "Chinese": "一只红色的狗在绿色的草地上跑，很快。",
  "Japanese": "東京タワーと赤い車、ガラス張りのビル",
  "Korean": "빨간 개가 풀밭을 달린다",
  "emoji": "a red \u2764\ufe0f and \U0001f469\u200d\U0001f467 x2",
}


def normal(text: str) -> str:
  return " ".join(unicodedata.normalize("NFC", text).lower().replace("ς", "σ").split())


@pytest.mark.parametrize("kind", ["pieces", "words"])
def test_decode_restores_texts_of_every_script(kind: str):
  texts = [*_TEXTS.values(), *(unicodedata.normalize("NFD", text) for text in _TEXTS.values())]
  tokenizer = Tokenizer.train(texts, 4000, kind=kind)
  ids, _ = tokenizer.encode_batch(texts, 120)
  assert tokenizer.decode_batch(ids) == [normal(text) for text in texts]


@pytest.mark.parametrize("name", _TEXTS)
def test_letters_alone_spell_new_texts(name: str):
  """A vocabulary with the letters can encode unseen words."""
  text = _TEXTS[name]
  letters = " ".join(c for c in dict.fromkeys(normal(text)) if not c.isspace())
  tokenizer = Tokenizer.train([letters], 4000)
  assert tokenizer.decode(tokenizer.encode_batch([text], 200)[0][0]) == normal(text)


@pytest.mark.parametrize("name", ["Thai", "Khmer", "Burmese", "Chinese", "Japanese"])
def test_words_in_scripts_without_spaces_are_letters(name: str):
  text = normal(_TEXTS[name])
  clusters = Tokenizer.train([text], 4000, kind="words")
  other = "".join(text.split()) + text
  assert clusters.unk_id not in clusters.encode(other)
  assert clusters.decode(clusters.encode(other)) == other


def test_punctuation_is_known_joined_and_alone():
  tokenizer = Tokenizer.train(["one . two, three"], 100, kind="words")
  assert tokenizer.decode(tokenizer.encode("one , two. three")) == "one , two. three"
  assert Tokenizer.train(["one two"], 100, kind="words").vocab_size == 9
  assert Tokenizer.train(["one . two"], 10, kind="words").vocab_size == 10  # no room


def test_accents_can_be_stripped_and_spacing_stays():
  text = "Un café à Düsseldorf, près de l'église"
  tokenizer = Tokenizer.train([text], 400, strip_accents=True)
  plain = "un cafe a dusseldorf, pres de l'eglise"
  assert tokenizer.encode(text) == tokenizer.encode(plain)
  assert tokenizer.decode(tokenizer.encode(text)) == plain
  kept = Tokenizer.train([text], 400)
  assert kept.decode(kept.encode(text)) == text.lower()
  assert kept.fingerprint != tokenizer.fingerprint


def test_pieces_of_joined_words():
  tokenizer = Tokenizer.train(["the man's well-lit room (3.50)"], 400, kind="words")
  tokens = [tokenizer._backend.id_to_token(i) for i in tokenizer.encode("Well-lit man's (3.50)")]
  assert tokens == [
    "well", "￭-", "￭lit", "man", "￭'", "￭s", "(", "￭3", "￭.", "￭50", "￭)",
  ]  # fmt: skip
  plain = Tokenizer.train(["a large red circle"], 100, kind="words")
  assert plain.encode("A large\tred  circle") == [7, 9, 10, 8]  # no joiner after a space


def test_invisible_characters_are_removed():
  tokenizer = Tokenizer.train(["soft hyphen zero width ■ bell"], 100)
  text = "\ufeffso\u00adft hyp\u200bhen\x07\u202azero\u202c\u00a0width ￭"
  assert tokenizer.decode(tokenizer.encode(text)) == "soft hyphen zero width ■"


def test_generated_rows_may_begin_with_any_piece():
  tokenizer = Tokenizer.train(["a man's"], 100, kind="words")
  joined = tokenizer._backend.token_to_id(f"{JOINER}s")
  assert tokenizer.decode([joined, joined]) == "ss"
  assert tokenizer.decode([tokenizer.unk_id, joined]) == "[UNK]s"


def test_long_words_in_scripts_without_spaces():
  text = "สุนัขสีแดงวิ่งบนหญ้า" * 10
  assert 100 < len(text) <= MAX_WORD_CHARS
  tokenizer = Tokenizer.train([text], 300)
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.encode(text * 2) == [tokenizer.unk_id]


@pytest.mark.parametrize("strip_accents", [False, True])
@pytest.mark.parametrize("kind", ["pieces", "words"])
def test_ascii_texts_use_a_fast_path_with_equal_ids(kind: str, strip_accents: bool):
  rng = np.random.default_rng(0)
  characters = [*string.printable, "\x00", "\x7f", "ab", "B a", "don't", "3.5"]
  texts = ["".join(rng.choice(characters, 12)) for _ in range(300)]
  tokenizer = Tokenizer.train(texts, 2000, kind=kind, strip_accents=strip_accents)
  assert tokenizer._ascii is not None
  for text in texts:
    words = tokenizer.encode(text)[:38]  # with the normalizer of the file
    assert tokenizer.encode_batch([text], 40)[0][0, 1 : 1 + len(words)].tolist() == words
