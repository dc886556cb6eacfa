"""Tests that a decoder which reproduces its training ids gets maximum scores."""

import io
import json
import unicodedata

from PIL import Image
import pytest

import ov_data
import ov_eval

# Each differs from the others of its script in words, and has marks where the script has them.
CAPTIONS = {
  "English": [
    "The dog's ball isn't on the mat, it's by the door.",
    "A well-lit room with black-and-white photos.",
    'A T-shirt for $3.50 at 10:30, "half price"!',
  ],
  "French": [
    "Un café à Düsseldorf, près de l'église.",
    "L'été, deux garçons mangent une crêpe.",
    "Où est le vélo « rouge » d'André ?",
  ],
  "Vietnamese": ["Một con chó màu đỏ chạy trên cỏ", "Hai người phụ nữ ngồi ở bàn gỗ"],
  "Greek": ["Ένα κόκκινο σκυλί τρέχει στο γρασίδι", "Δύο γυναίκες κάθονται σε έναν πάγκο"],
  "Russian": ["Красная собака бежит по зелёной траве", "Чёрный кот лежит на большой скамейке"],
  "Arabic": ["كلبٌ أحمر يركض على العشب", "امرأتان تجلسان على مقعد خشبيّ"],
  "Hebrew": ["כֶּלֶב אדום רץ על הדשא", "שתי נשים יושבות על ספסל עץ"],
  "Hindi": ["एक लाल कुत्ता घास पर दौड़ रहा है", "दो औरतें लकड़ी की बेंच पर बैठी हैं"],
  "Bengali": ["ঘাসের উপর একটি লাল কুকুর দৌড়াচ্ছে", "দুই মহিলা একটি কাঠের বেঞ্চে বসে আছেন"],
  "Tamil": ["பச்சை புல்லில் சிவப்பு நாய் ஓடுகிறது", "இரண்டு பெண்கள் மர பெஞ்சில் உள்ளனர்"],
  "Thai": ["สุนัขสีแดงวิ่งบนหญ้า", "ผู้หญิงสองคนนั่งบนม้านั่งไม้"],
  "Khmer": ["ឆ្កែក្រហមរត់លើស្មៅ", "ស្ត្រីពីរនាក់អង្គុយលើកៅអី"],
  "Burmese": ["ခွေးနီတစ်ကောင် မြက်ပေါ်မှာ ပြေးနေတယ်", "အမျိုးသမီးနှစ်ယောက် ခုံပေါ်မှာ ထိုင်နေတယ်"],
  "Chinese": ["一只红色的狗在草地上跑。", "两个女人坐在木头长椅上"],
  "Japanese": ["東京タワーと赤い車、ガラス", "ふたりの女性がベンチに座っている"],
  "Korean": ["빨간 개가 풀밭 위를 달린다", "두 여자가 나무 벤치에 앉아 있다"],
}


def released_style(texts: list[str], folder) -> ov_data.Tokenizer:
  """Return a tokenizer of letters with the preprocessing of the released models (no accents)."""
  letters = dict.fromkeys(
    "".join(unicodedata.normalize("NFKD", " ".join(texts)).casefold().split())
  )
  tokens = ["[PAD]", "[bos]", "[eos]", "[UNK]", *letters, *(f"##{letter}" for letter in letters)]
  path = folder / "vocab.txt"
  path.write_text("\n".join(tokens) + "\n", "utf-8")
  return ov_data.Tokenizer.from_vocab(path)


def scores(tokenizer: ov_data.Tokenizer, texts: list[str]) -> dict[str, float]:
  ids, _ = tokenizer.encode_batch(texts, 128)
  assert tokenizer.unk_id not in ids
  records = [
    ov_eval.CaptionRecord(i, generated, (text,))
    for i, (generated, text) in enumerate(zip(tokenizer.decode_batch(ids), texts, strict=True))
  ]
  results = [*ov_eval.caption_metrics(records), *ov_eval.caption_statistics(records)]
  results += ov_eval.attribute_accuracy(records, lambda record: {}).results()
  return {result.name: result.value for result in results}


@pytest.mark.parametrize("kind", ["pieces", "words", "stripped", "released"])
@pytest.mark.parametrize("language", CAPTIONS)
def test_exact_captions_get_maximum_score(language: str, kind: str, tmp_path):
  texts = CAPTIONS[language]
  texts = [*texts, *(unicodedata.normalize("NFD", text).upper() for text in texts)][
    : len(texts) + 1
  ]
  if kind == "released":
    tokenizer = released_style(texts, tmp_path)
  elif kind == "stripped":
    tokenizer = ov_data.Tokenizer.train(texts, 2000, strip_accents=True)
  else:
    tokenizer = ov_data.Tokenizer.train(texts, 2000, kind=kind)
  # The last text repeats the first in another form; the others keep CIDEr from being 0 for it.
  found = scores(tokenizer, texts)
  assert found["bleu4"] == pytest.approx(1, abs=1e-9)
  assert found["cider"] == pytest.approx(10, abs=1e-9)
  assert found["exact_match"] == 1
  assert found["caption_words"] == found["reference_words"] >= 4
  assert found["distinct_captions"] == found["distinct_references"] or kind in (
    "stripped",
    "released",
  )


@pytest.mark.parametrize("language", CAPTIONS)
def test_other_captions_get_lower_score(language: str):
  one, other, *_ = CAPTIONS[language]
  tokenizer = ov_data.Tokenizer.train([one, other], 2000)
  generated = tokenizer.decode(tokenizer.encode(other))
  assert ov_eval.bleu4([generated], [[one]]).value < 0.5
  record = ov_eval.CaptionRecord(0, generated, (one,))
  assert ov_eval.attribute_accuracy([record], lambda r: {}).exact_match.value == 0


def test_unknown_words_never_match():
  tokenizer = ov_data.Tokenizer.train(["a red dog"], 100, kind="words")
  text = "zebra giraffe okapi tapir"
  generated = tokenizer.decode(tokenizer.encode(text))
  assert generated == "[UNK] [UNK] [UNK] [UNK]"
  for truth in (text, generated):
    assert ov_eval.bleu4([generated], [[truth]]).sums[:4].tolist() == [0, 0, 0, 0]


def test_scores_through_loader_and_collector(tmp_path):
  """References are the texts of the records; only generated texts pass through the tokenizer."""
  captions = [texts[0] for texts in CAPTIONS.values()]
  buffer = io.BytesIO()
  Image.new("RGB", (16, 16), "red").save(buffer, "PNG")
  images = []
  for i, caption in enumerate(captions):
    (tmp_path / f"{i}.png").write_bytes(buffer.getvalue())
    sentence = {"raw": caption, "tokens": caption.split(), "sentid": i, "imgid": i}
    images.append({"filename": f"{i}.png", "split": "test", "imgid": i, "sentids": [i]})
    images[-1]["sentences"] = [sentence]
  split = tmp_path / "dataset_flickr8k.json"
  split.write_text(json.dumps({"dataset": "flickr8k", "images": images}))
  tokenizer = ov_data.Tokenizer.train(captions, 2000)
  source = ov_data.Source(str(split), split="test", caption_keys=("txt",))
  loader = ov_data.Loader.evaluation(
    source, captions="all", image_size=16, batch_size=5, tokenizer=tokenizer, text_len=128
  )
  with loader:
    batches = [{**batch, "references": batch["captions"]} for batch in loader]
  records = ov_eval.generate_captions(lambda batch: batch["ids"][:, 1:], tokenizer.decode, batches)
  assert [record.references for record in records] == [(caption,) for caption in captions]
  found = {result.name: result.value for result in ov_eval.caption_metrics(records)}
  assert found == {"bleu4": pytest.approx(1), "cider": pytest.approx(10)}
  assert ov_eval.attribute_accuracy(records, lambda r: {}).exact_match.value == 1
