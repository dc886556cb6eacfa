// Answers the requests of app.js in the browser, like the server of ov-serve. Models run in
// onnxruntime-web on the CPU (WebAssembly).

import { decode, normalize, resize } from "./preprocess.js";
import { Tokenizer, canonicalize } from "./tokenizer.js";

const TEMPLATE = "a photo of a {}";
const MAX_BYTES = 64 * 2 ** 20; // of an image, as in Python

async function read(path, kind = "json") {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: status ${response.status}; copy the complete folder to the server`);
  return response[kind]();
}

/** Return a function that starts `load` at the first call, and again after a failure. */
function lazy(load) {
  let promise = null;
  return () => {
    promise ??= load().catch((error) => {
      promise = null;
      throw error;
    });
    return promise;
  };
}

const runtime = lazy(async () => {
  let ort;
  try {
    ort = await import("./ort/ort.wasm.min.mjs");
  } catch {
    const { runtime } = await read("page.json");
    throw new Error(`onnxruntime-web is missing: run "npm pack ${runtime}", and copy its dist/ort.wasm.min.mjs, ` +
      "dist/ort-wasm-simd-threaded.mjs and dist/ort-wasm-simd-threaded.wasm to the folder ort of this page");
  }
  ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
  // Threads require a server that isolates the page (COOP and COEP headers).
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  return ort;
});

const files = lazy(async () => {
  const [page, preprocessor, content] = await Promise.all([
    read("page.json"), read("preprocessor.json"), read("tokenizer.json").catch(() => null),
  ]);
  const tokenizer = content && preprocessor.words ? new Tokenizer(content, preprocessor.words) : null;
  for (const { text, ids } of tokenizer ? page.golden : []) {
    if (String(tokenizer.pack(text)) !== String(ids)) {
      throw new Error(`this browser tokenizes ${JSON.stringify(text)} differently; update it`);
    }
  }
  let vectors = null;
  if (page.images.length) {
    vectors = new Float32Array(await read("images/vectors.bin", "arrayBuffer"));
    if (vectors.length !== page.images.length * page.dim) throw new Error("images/vectors.bin is incomplete");
  }
  return { page, preprocessor, tokenizer, vectors };
});

const tower = (name) => lazy(async () => {
  const status = document.getElementById("status");
  const before = status.textContent;
  const message = `Loading the ${name} model…`;
  status.textContent = message;
  const ort = await runtime();
  const session = await ort.InferenceSession.create(`./${name}.onnx`, {
    executionProviders: ["wasm"],
    externalData: [{ path: `${name}.onnx.data`, data: `./${name}.onnx.data` }],
  });
  if (status.textContent === message) status.textContent = before;
  return { ort, session };
});
const towers = { image: tower("image"), text: tower("text") };

let last = Promise.resolve();
/** Run a model after all earlier runs, and return the unit vector of its output. */
function run(name, makeInput) {
  const next = last.then(async () => {
    const { ort, session } = await towers[name]();
    const out = await session.run({ [session.inputNames[0]]: makeInput(ort) });
    const { data } = out[["embedding", "pooled"].find((key) => key in out) ?? session.outputNames[0]];
    const length = Math.hypot(...data);
    return Float32Array.from(data, (x) => x / length);
  });
  last = next.catch(() => {});
  return next;
}

const known = new Map(); // embeddings of texts
async function embedText(text) {
  const { tokenizer } = await files();
  if (!known.has(text)) {
    const ids = BigInt64Array.from(tokenizer.pack(text), BigInt);
    known.set(text, await run("text", (ort) => new ort.Tensor("int64", ids, [1, ids.length])));
  }
  return known.get(text);
}

const embedded = new WeakMap(); // embeddings of files
async function embedImage(file) {
  if (!embedded.has(file)) {
    const { preprocessor } = await files();
    let image;
    try {
      image = await decode(file);
    } catch (error) {
      throw new Error(`${file.name ?? "the image"} cannot be decoded: ${error.message}`);
    }
    const pixels = normalize(resize(image.pixels, image.width, image.height, preprocessor), preprocessor);
    const side = preprocessor.image_size;
    embedded.set(file, await run("image", (ort) => new ort.Tensor("float32", pixels, [1, 3, side, side])));
  }
  return embedded.get(file);
}

const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);

async function nearest(vector, count) {
  const { page, vectors } = await files();
  const start = performance.now();
  const found = page.images.map((key, row) => ({
    row, key, image: `images/${row}.jpg`, score: dot(vector, vectors.subarray(row * page.dim, (row + 1) * page.dim)),
  }));
  found.sort((a, b) => b.score - a.score || a.row - b.row);
  return { results: found.slice(0, count), milliseconds: performance.now() - start };
}

async function search(parameters, body) {
  if (body instanceof Blob) return nearest(await embedImage(body), Number(parameters.get("k") ?? 20));
  const { text, row, k } = JSON.parse(body);
  if (row === undefined) return nearest(await embedText(text), k);
  const { page, vectors } = await files();
  return nearest(vectors.subarray(row * page.dim, (row + 1) * page.dim), k);
}

async function classify(parameters, body) {
  const { page, preprocessor } = await files();
  const labels = parameters.getAll("labels");
  const image = await embedImage(body);
  const logits = [];
  for (const label of labels) {
    const prompt = TEMPLATE.replace("{}", () => label);
    const text = await embedText(page.canonical ? canonicalize(prompt) : prompt);
    logits.push(preprocessor.logit_scale * dot(image, text));
  }
  const most = Math.max(...logits);
  const weights = logits.map((x) => Math.exp(x - most));
  const sum = weights.reduce((a, b) => a + b, 0);
  const probability = page.sigmoid
    ? (i) => 1 / (1 + Math.exp(-logits[i] - preprocessor.logit_bias))
    : (i) => weights[i] / sum;
  const scored = labels.map((label, i) => ({ label, probability: probability(i) }));
  return { labels: scored.sort((a, b) => b.probability - a.probability) };
}

async function info() {
  const { page, tokenizer } = await files();
  const texts = tokenizer !== null && page.texts;
  return {
    model: page.model, images: page.images.length, has_images: true, captions: false,
    text_search: texts && page.images.length > 0, text_labels: texts, body_bytes: MAX_BYTES,
  };
}

const ROUTES = { "/api/info": info, "/api/search": search, "/api/classify": classify };

/** Answer a request of app.js like `fetch`. */
globalThis.backend = async (path, options = {}) => {
  const { pathname, searchParams } = new URL(path, "http://page");
  try {
    const answer = await ROUTES[pathname](searchParams, options.body);
    return { ok: true, json: async () => answer };
  } catch (error) {
    return { ok: false, json: async () => ({ error: { message: error.message } }) };
  }
};
