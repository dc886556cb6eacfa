// Tokenizer of an exported model: reads tokenizer.json of the `tokenizers` library.
//
// Supported are WordPiece and BPE with the text preparation that this repository writes and reads.
// //apps:export refuses other tokenizers for this page. Ids equal those of Python.

const WHITE = /\p{White_Space}/u;
const SCRIPTS = "Han|Hiragana|Katakana|Thai|Lao|Khmer|Myanmar|Hangul|Latin|Greek|Cyrillic|Arabic|Hebrew";
const MAX_CHARS = 16_384; // of a text, as in Python

/** Return a regular expression of the `tokenizers` library (Oniguruma) as one of JavaScript. */
export function regex(source) {
  const translated = source
    .replace(new RegExp(`\\\\p\\{(${SCRIPTS})\\}`, "g"), "\\p{Script=$1}")
    .replace(/\[:(\w+):\]/g, "\\p{$1}")
    // Operands of an intersection are classes.
    .replace(/\[([^[\]]*)&&\[/g, "[[$1]&&[")
    // White space in Oniguruma is the property; in JavaScript it lacks U+0085 and has U+FEFF.
    .replace(/\\s/g, "\\p{White_Space}")
    .replace(/\\S/g, "\\P{White_Space}")
    // Escapes that are errors in JavaScript.
    .replace(/\\(["'#%&,:;<=>@_`~! ])/g, "$1")
    .replace(/\(\?i:([^)]*)\)/g, "(?:$1)");
  const flags = source.includes("(?i:") ? "giv" : "gv";
  return new RegExp(escapeClasses(translated), flags);
}

/** Escape characters that must be escaped within a class of the `v` flag. */
function escapeClasses(source) {
  let out = "";
  let depth = 0;
  for (let i = 0; i < source.length; i++) {
    const c = source[i];
    if (c === "\\") {
      const end = /^\\[pPu]\{/.test(source.slice(i)) ? source.indexOf("}", i) + 1 : i + 2;
      out += source.slice(i, end);
      i = end - 1;
    } else if (c === "[") {
      depth += 1;
      out += c;
    } else if (c === "]" && depth > 0) {
      depth -= 1;
      out += c;
    } else if (depth > 0 && "(){}/|".includes(c)) {
      out += `\\${c}`;
    } else if (depth > 0 && "!#$%*+,.:;<=>?@`~".includes(c) && source[i + 1] === c) {
      out += `\\${c}`;
    } else {
      out += c;
    }
  }
  return out;
}

function pattern({ String: text, Regex: source }) {
  return source === undefined ? text : regex(source);
}

// Letters are lower-cased one by one, without the rule for a sigma at the end of a word.
const lower = (text) => Array.from(text, (c) => c.toLowerCase()).join("");

function isChinese(c) {
  const code = c.codePointAt(0);
  return (
    (code >= 0x4e00 && code <= 0x9fff) || (code >= 0x3400 && code <= 0x4dbf) ||
    (code >= 0x20000 && code <= 0x2a6df) || (code >= 0x2a700 && code <= 0x2b73f) ||
    (code >= 0x2b740 && code <= 0x2b81f) || (code >= 0x2b920 && code <= 0x2ceaf) ||
    (code >= 0xf900 && code <= 0xfaff) || (code >= 0x2f800 && code <= 0x2fa1f)
  );
}

function bertNormalizer(step) {
  if (step.clean_text || step.strip_accents) {
    throw new Error("BertNormalizer with clean_text or strip_accents is not supported");
  }
  return (text) => {
    if (step.handle_chinese_chars) {
      text = Array.from(text, (c) => (isChinese(c) ? ` ${c} ` : c)).join("");
    }
    return step.lowercase ? lower(text) : text;
  };
}

const NORMALIZERS = {
  Sequence: (step) => chain(step.normalizers.map(normalizer)),
  NFC: () => (text) => text.normalize("NFC"),
  NFD: () => (text) => text.normalize("NFD"),
  NFKC: () => (text) => text.normalize("NFKC"),
  NFKD: () => (text) => text.normalize("NFKD"),
  Lowercase: () => lower,
  Replace: (step) => {
    const found = pattern(step.pattern);
    return (text) => text.replaceAll(found, () => step.content);
  },
  Strip: (step) => {
    const ends = [];
    if (step.strip_left) ends.push("^\\p{White_Space}+");
    if (step.strip_right) ends.push("\\p{White_Space}+$");
    const found = new RegExp(ends.join("|"), "gu");
    return (text) => (ends.length ? text.replace(found, "") : text);
  },
  BertNormalizer: bertNormalizer,
};

const chain = (steps) => (text) => steps.reduce((value, step) => step(value), text);

function choose(table, step, kind) {
  if (!Object.hasOwn(table, step.type)) throw new Error(`${kind} ${step.type} is not supported`);
  return table[step.type](step);
}

const normalizer = (step) => (step ? choose(NORMALIZERS, step, "normalizer") : (text) => text);

const splitAtWhite = (text) => text.split(/\p{White_Space}+/u).filter(Boolean);

/** Split a word so that each match of punctuation is alone. */
function isolate(word) {
  return word.match(/[\p{P}!-\/:-@[-`{-~]|[^\p{P}!-\/:-@[-`{-~]+/gu) ?? [];
}

// The characters of GPT-2 for bytes: printable ones are themselves, the others follow U+0100.
const BYTES = (() => {
  const table = [];
  let next = 256;
  for (let byte = 0; byte < 256; byte++) {
    const printable =
      (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    table.push(String.fromCodePoint(printable ? byte : next++));
  }
  return table;
})();
const GPT2 = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

function byteLevel(step) {
  const encoder = new TextEncoder();
  return (word) => {
    if (step.add_prefix_space && !WHITE.test(word[0])) word = ` ${word}`;
    const parts = step.use_regex === false ? [word] : (word.match(GPT2) ?? []);
    return parts.map((part) => Array.from(encoder.encode(part), (byte) => BYTES[byte]).join(""));
  };
}

function split(step) {
  const found = pattern(step.pattern);
  const global = typeof found === "string" ? new RegExp(found.replace(/[^\w\s]/g, "\\$&"), "g") : found;
  if (step.behavior !== "Removed" && step.behavior !== "Isolated") {
    throw new Error(`Split with behavior ${step.behavior} is not supported`);
  }
  return (word) => {
    const parts = [];
    let end = 0;
    for (const match of word.matchAll(global)) {
      if (!match[0]) continue;
      const between = word.slice(end, match.index);
      const keepMatch = step.behavior === "Isolated" || step.invert;
      const keepBetween = step.behavior === "Isolated" || !step.invert;
      if (between && keepBetween) parts.push(between);
      if (keepMatch) parts.push(match[0]);
      end = match.index + match[0].length;
    }
    const rest = word.slice(end);
    if (rest && (step.behavior === "Isolated" || !step.invert)) parts.push(rest);
    return parts;
  };
}

const SPLITTERS = {
  Sequence: (step) => {
    const steps = step.pretokenizers.map(splitter);
    return (text) => steps.reduce((words, next) => words.flatMap(next), [text]);
  },
  WhitespaceSplit: () => splitAtWhite,
  BertPreTokenizer: () => (text) => splitAtWhite(text).flatMap(isolate),
  ByteLevel: byteLevel,
  Split: split,
};

const splitter = (step) => (step ? choose(SPLITTERS, step, "pre-tokenizer") : (text) => [text]);

/** Greedy longest match of pieces from the left. */
function wordPiece(model, vocabulary) {
  const unknown = vocabulary.get(model.unk_token);
  return (word) => {
    const characters = Array.from(word);
    if (characters.length > model.max_input_chars_per_word) return [unknown];
    const ids = [];
    for (let start = 0; start < characters.length; ) {
      let end = characters.length;
      let id;
      for (; end > start; end--) {
        const piece = characters.slice(start, end).join("");
        id = vocabulary.get(start ? model.continuing_subword_prefix + piece : piece);
        if (id !== undefined) break;
      }
      if (id === undefined) return [unknown];
      ids.push(id);
      start = end;
    }
    return ids;
  };
}

/** Merges of the pair with the lowest rank, the leftmost first. */
function bytePairs(model, vocabulary) {
  if (model.dropout || model.byte_fallback || model.continuing_subword_prefix) {
    throw new Error("BPE with dropout, byte_fallback or a prefix is not supported");
  }
  const suffix = model.end_of_word_suffix ?? "";
  const unknown = model.unk_token == null ? undefined : vocabulary.get(model.unk_token);
  const key = (a, b) => `${a}\u0000${b}`;
  const ranks = new Map();
  model.merges.forEach((merge, rank) => {
    const [a, b] = Array.isArray(merge) ? merge : merge.split(" ");
    ranks.set(key(a, b), rank);
  });
  return (word) => {
    if (model.ignore_merges && vocabulary.has(word)) return [vocabulary.get(word)];
    const pieces = Array.from(word);
    if (pieces.length) pieces[pieces.length - 1] += suffix;
    for (;;) {
      let best = Infinity;
      let at = -1;
      for (let i = 0; i + 1 < pieces.length; i++) {
        const rank = ranks.get(key(pieces[i], pieces[i + 1]));
        if (rank !== undefined && rank < best) [best, at] = [rank, i];
      }
      if (at < 0) break;
      pieces.splice(at, 2, pieces[at] + pieces[at + 1]);
    }
    return pieces.flatMap((piece) => {
      const id = vocabulary.get(piece) ?? unknown;
      return id === undefined ? [] : [id];
    });
  };
}

const MODELS = { WordPiece: wordPiece, BPE: bytePairs };

export class Tokenizer {
  /**
   * @param {object} content tokenizer.json.
   * @param {object} words length, append_cls, pad_id, bos_id, eos_id and cls_id, as in
   *   preprocessor.json.
   */
  constructor(content, words) {
    const { model } = content;
    if (!Object.hasOwn(MODELS, model.type)) throw new Error(`model ${model.type} is not supported`);
    this.words = words;
    this.normalize = normalizer(content.normalizer);
    this.split = splitter(content.pre_tokenizer);
    this.encodeWord = MODELS[model.type](model, new Map(Object.entries(model.vocab)));
  }

  /** Return the ids of a text without special tokens. */
  encode(text) {
    const valid = Array.from(text.replace(/\p{Cs}/gu, "?")).slice(0, MAX_CHARS);
    return this.split(this.normalize(valid.join(""))).flatMap((word) => this.encodeWord(word));
  }

  /** Return the ids of a text as the model reads it: [bos] pieces [eos] padding [CLS]. */
  pack(text) {
    const { length, append_cls, pad_id, bos_id, eos_id, cls_id } = this.words;
    const first = bos_id == null ? [] : [bos_id];
    const room = length - (append_cls ? 1 : 0) - 1 - first.length;
    const ids = [...first, ...this.encode(text).slice(0, room), eos_id];
    while (ids.length < length) ids.push(pad_id);
    if (append_cls) ids[length - 1] = cls_id;
    return ids;
  }
}

const ASCII_PUNCTUATION = /[!-\/:-@[-`{-~]/g;

/** Prepare a prompt as evaluation does: lower case without ASCII punctuation except commas. */
export function canonicalize(text) {
  const parts = text.replaceAll("_", " ").split(",");
  const cleaned = parts.map((part) => part.replace(ASCII_PUNCTUATION, "")).join(",");
  // White space of Python.
  return cleaned.toLowerCase().split(/[\p{White_Space}\x1c-\x1f]+/u).filter(Boolean).join(" ");
}
