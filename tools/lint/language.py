"""Check documentation pages for phrases that have a plainer equivalent."""

import re

from tools.lint.tree import Tree, Violation

# Words and phrases, and their replacements.
BANNED = {
  "asks for": "requires, needs",
  "beside": "next to, in addition to",
  "comes on top": "is added",
  "exchange": "collective",
  "exchanges": "collectives",
  "figure": "metric, number",
  "figures": "metrics, numbers",
  "goes on": "resumes, continues",
  "go on": "resume, continue",
  "lies behind": "comes after",
  "lies in": "is stored in",
  "made again": "recomputed",
  "make again": "recompute",
  "makes again": "recomputes",
  "mend": "fix",
  "not finite": "NaN or Inf",
  "of its own": "own, separate",
  "of ours": "own, custom",
  "of their own": "own, separate",
  "picture": "image",
  "pictures": "images",
  "predecessor": "the released OpenVision code",
  "predecessors": "the released OpenVision code",
  "share of": "fraction of",
  "stand-in": "fake, stub",
  "stand-ins": "fakes, stubs",
  "tells": "reports, prints",
  "that is none": "that is invalid",
  "the walls": "the import rules",
  "told": "logged, reported",
  "wanted by": "required by",
  "wants": "requires, needs",
  "what is kept": "saved activations",
  "what lives": "live buffers",
}
_PHRASES = "|".join(BANNED).replace(" ", r"\s+")
_PATTERN = re.compile(rf"(?<![\w=-])({_PHRASES})(?![\w=-])", re.IGNORECASE)


def check_language(tree: Tree) -> list[Violation]:
  """Check that Markdown pages use standard terms; text in backticks is exempt."""
  violations = []
  for path in sorted(path for path in tree.files if path.endswith(".md")):
    text = re.sub(r"`[^`\n]*`", "", tree.read(path))
    for match in _PATTERN.finditer(text):
      phrase = " ".join(match[0].split())
      number = text.count("\n", 0, match.start()) + 1
      violations.append(Violation(path, number, f'"{phrase}": write {BANNED[phrase.lower()]}'))
  return violations
