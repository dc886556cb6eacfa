"""Tokenizer of the COCO caption evaluation: lowercase Penn Treebank tokens without punctuation.

The COCO evaluation code runs PTBTokenizer of Stanford CoreNLP 3.4.1 (`-preserveLines -lowerCase`)
and removes 18 punctuation tokens. `ptb_words` returns the same tokens without Java. The rules were
derived from the output of PTBTokenizer; the README lists the remaining, rare differences.
"""

from collections.abc import Callable
import functools

import regex

# Tokens removed by the COCO code. It also lists "-LRB-" etc., which never match in lower case.
_DROPPED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
_NAMED = {
  "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
  "\u00bd": "1/2", "\u00bc": "1/4", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3",
  "\u20ac": "$", "\u00a3": "#", "\u00a2": "cents", "&amp;": "&", "&lt;": "<", "&gt;": ">",
}  # fmt: skip
# Abbreviations that keep their full stop: always, only if capitalised, only before a number.
_ABBREVIATIONS = (
  "adm al ala alex apr ariz assn assoc aug ave bldg blvd brig bros calif capt cf cie cmdr co col "
  "colo conn corp cos cpl ct dec dept det dr esq est etc ext feb fla ft ga gen gov govs hon inc "
  "ind insp intl jan jr jul jun kan ky lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont "
  "mr mrs ms mt natl neb nev nov oct okla penn ph plc pres prof pty rd rep reps rev rt sen sens "
  "sep sept seq sgt sq sr st ste supt tel tenn thu thurs tue tues univ va vs vt wed fri wis wyo pvt"
).replace(" ", "|")
_CAPITAL_ABBREVIATIONS = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_NUMBER_ABBREVIATIONS = "art|ca|figs?|nos?|op|pp|prop"
_SENTENCE_STARTS = (
  "A About According Additionally After An As At But Earlier He Her Here However If In It Last "
  "Many More Now Once One Other Our She Since So Some Such That The Their Then There These They "
  "This We What When While Yet You"
).replace(" ", "|")

_L = r"[\p{L}\p{M}]"
_A = r"[\p{L}\p{M}\p{Nd}]"
_WORD = rf"{_L}{_A}*(?:[.!?]{_L}{_A}*)*"
_HYPHENATED = rf"{_A}+(?:[-_\u2010]{_A}+)+"
_APOSTROPHE = "['\u2019]"
_CLITIC = rf"{_APOSTROPHE}(?:[smd]|re|ve|ll)(?!{_A})"
_NEGATION = rf"n{_APOSTROPHE}t(?!{_A})"
_RULES: tuple[str, ...] = (
  # The longest match at a position wins; ties go to the earlier rule. The group `keep` is the
  # token if it is shorter than the match.
  r"<(?:/?\p{L}[^<>\n]*|[^<>\s]+@[^<>\s]+)>",
  r"(?:https?|ftp)://[^\s\"'<>()]*[^\s\"'<>().,:!?]",
  rf"(?:{_A}|[-_])+(?:\.(?:{_A}|[-_])+)*\.(?:com|net|org|edu|gov)(?!{_A})(?:/[^\s\"'<>()]*[^\s\"'<>().,;:!?])?",
  rf"{_A}[^\s\"'<>|()@]*@(?:[^\s\"'<>|()@.]+\.)*[^\s\"'<>|()@.]+",
  rf"[@#]\p{{L}}(?:{_A}|_)*",
  rf"(?P<keep>can)not(?!{_A})|(?P<keep>gon|wan)na(?!{_A})|(?P<keep>got)ta(?!{_A})",
  rf"(?P<keep>gim|lem)me(?!{_A})|(?P<keep>y{_APOSTROPHE})all(?!{_A})",
  rf"(?P<keep>'t)(?:is|was)(?!{_A})",
  _WORD,
  rf"(?P<keep>{_L}{_A}*?){_NEGATION}",
  _NEGATION,
  rf"(?P<keep>{_HYPHENATED}|{_WORD}|(?-i:[A-Z]+(?:&[A-Z]+)+)){_CLITIC}",
  rf"(?:[dlon]|qu|ne|e|hallowe|ma|ev){_APOSTROPHE}(?!n{_APOSTROPHE}){_L}{{2,}}",
  rf"[dlo]{_APOSTROPHE}{_L}{_A}+|c{_APOSTROPHE}est|(?P<keep>j{_APOSTROPHE}){_L}+|li{_APOSTROPHE}l(?!{_A})",
  rf"(?P<keep>{_L}+)'n'{_L}",
  _CLITIC,
  rf"'(?:n'?|em|til|cause)(?!{_A})|{_APOSTROPHE}\d0s(?!{_A})",
  rf"(?P<keep>more)'n(?!{_A})|\bol'(?!{_A})",
  r"[-+]?(?:\d+(?:[.,:]\d+)*|(?:[.,:]\d+)+)",
  r"\d+[ \u00a0]\d+/\d+|\d+/\d+(?:/\d+)?",
  rf"\d+{_L}{_A}*",
  _HYPHENATED,
  rf"{_A}+(?:-{_A}+)*/{_A}+(?:[-/]{_A}+)*",  # also w/o, a/c
  r"(?-i:[A-Z]+(?:&[A-Z]+)+)",
  rf"(?:{_A}+-)?\p{{L}}(?:\.\p{{L}})+\.(?:-{_A}+)*(?!{_A})",
  rf"(?:{_ABBREVIATIONS})\.(?!{_A})|ph\.d\.(?!{_A})",
  rf"(?-i:{_CAPITAL_ABBREVIATIONS}|{_CAPITAL_ABBREVIATIONS.upper()})\.(?!{_A})",
  rf"(?:{_NUMBER_ABBREVIATIONS})\.(?=\s*\d)",
  rf"(?P<keep>\p{{L}})\.(?=\s+(?-i:{_SENTENCE_STARTS})\s)|\p{{L}}\.(?!{_A})",
  r"(?-i:[A-Z]{1,2})\$",
  rf"c\+\+|[cf]#(?!{_A})",
  r"[:;=]['o-]?[()\[\]]|[:;=][-']?[dpo|](?!\w)|\^_\^|-_-",
  r"\.{2,}|\.(?: \.){2,}",
  r"-{2,}|\*+|_+|#+|@+|[!?]+",
  r"&(?:amp|lt|gt);",
)
_INVISIBLE = regex.compile(r"[\p{Cf}\ufe00-\ufe0f--\u200b]", regex.V1)
_NO_TOKEN = regex.compile(r"[\u200b\U00010000-\U0010ffff]")  # skipped by PTBTokenizer
_PLAIN = regex.compile(r"[A-Za-z]+(?=\s|$)")  # fast path for most words
_SPLIT = frozenset(("cannot", "gonna", "wanna", "gotta", "gimme", "lemme"))
_SPACE = regex.compile(r"\s+")
_QUOTES = frozenset("\"'`\u2018\u2019\u201a\u201b\u201c\u201d\u00ab\u00bb\u2039\u203a")
_DASHES = frozenset("\u2012\u2013\u2014\u2015")


@functools.cache
def _matchers() -> tuple[Callable[..., regex.Match | None], ...]:
  return tuple(regex.compile(rule, regex.IGNORECASE).match for rule in _RULES)


def ptb_words(text: str) -> list[str]:
  """Split a caption as the COCO caption evaluation does.

  >>> ptb_words("The dog's well-lit; it doesn't cost $3.50!")
  ['the', 'dog', "'s", 'well-lit', 'it', 'does', "n't", 'cost', '$', '3.50']
  """
  words: list[str] = []
  position = 0
  text = _INVISIBLE.sub("", _NO_TOKEN.sub(" ", text))
  while position < len(text):
    if space := _SPACE.match(text, position):
      position = space.end()
      continue
    if (plain := _PLAIN.match(text, position)) and plain[0].lower() not in _SPLIT:
      words.append(plain[0].lower())
      position = plain.end()
      continue
    longest, token = 0, text[position]
    for match in _matchers():
      found = match(text, position)
      if found and found.end() - position > longest:
        longest = found.end() - position
        token = found["keep"] if "keep" in found.re.groupindex and found["keep"] else found[0]
    position += len(token)
    words += _finished(token)
  return words


def _finished(token: str) -> list[str]:
  """Return the tokens into which the COCO code converts a Penn Treebank token."""
  if token in _QUOTES or token in _DASHES or not token.strip("-") or not token.strip(". \u2026"):
    return []
  token = _NAMED.get(token, token).lower()
  for bracket in "()[]":
    if token[0] in ":;=":
      token = token.replace(bracket, _NAMED[bracket] if bracket in "()" else bracket)
  if token[0] == "\u2019" and token[1:] in ("s", "m", "d", "re", "ve", "ll"):
    token = "'" + token[1:]
  token = token.replace("n\u2019t", "n't")
  return [part for part in token.split() if part and part not in _DROPPED]
