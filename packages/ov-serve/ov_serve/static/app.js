"use strict";

// All text of the index is set with textContent, so names and captions cannot add markup.
const $ = (id) => document.getElementById(id);
const DELAY = 150; // milliseconds between the last key and the search

let info = null;
let image = null; // the chosen file, or null
let timer = 0;
const running = {}; // the newest request of each kind
// The page of `//apps:export --format=web` has no server and answers requests itself.
const send = globalThis.backend ?? fetch.bind(globalThis);

function status(text, error = false) {
  $("status").textContent = text;
  $("status").className = error ? "error" : "";
}

/** Send a request and cancel the previous one of the same kind; resolve to null if cancelled. */
async function call(kind, path, options = {}) {
  running[kind]?.abort();
  const control = (running[kind] = new AbortController());
  try {
    const response = await send(path, { ...options, signal: control.signal });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error?.message ?? `status ${response.status}`);
    return control.signal.aborted ? null : answer;
  } catch (error) {
    if (control.signal.aborted) return null;
    throw error;
  } finally {
    if (running[kind] === control) delete running[kind];
  }
}

const post = (kind, path, value) =>
  call(kind, path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(value),
  });

const postImage = (kind, path, values = []) =>
  call(kind, `${path}?${new URLSearchParams(values)}`, {
    method: "POST",
    headers: { "content-type": image.type || "image/jpeg" },
    body: image,
  });

function item(match) {
  const button = document.createElement("button");
  button.type = "button";
  button.tabIndex = -1;
  const about = match.captions?.[0] ?? match.class_name ?? "";
  if (info.has_images) {
    const picture = document.createElement("img");
    picture.loading = "lazy";
    picture.alt = about || match.key;
    picture.src = match.image ?? `/images/${match.row}?size=320`;
    button.append(picture);
  }
  const text = document.createElement("span");
  text.className = "text";
  const score = document.createElement("b");
  score.textContent = match.score.toFixed(3);
  const key = document.createElement("span");
  key.className = "key";
  key.textContent = match.key;
  text.append(score, " ", about, key);
  button.append(text);
  button.title = "Find similar images";
  button.addEventListener("click", () => similar(match));
  const entry = document.createElement("li");
  entry.append(button);
  return entry;
}

function show(answer, what) {
  if (answer === null) return;
  $("results").replaceChildren(...answer.results.map(item));
  const first = $("results").querySelector("button");
  if (first) first.tabIndex = 0;
  const count = answer.results.length;
  status(`${count} ${count === 1 ? "image" : "images"} ${what}, ${answer.milliseconds.toFixed(1)} ms`);
}

function clearResults() {
  running.search?.abort();
  $("results").replaceChildren();
  status("");
}

async function attempt(work) {
  try {
    await work();
  } catch (error) {
    status(error.message, true);
  }
}

function searchText() {
  const text = $("query").value.trim();
  history.replaceState(null, "", text ? `#${new URLSearchParams({ q: text })}` : location.pathname);
  if (!text) return clearResults();
  return attempt(async () => show(await post("search", "/api/search", { text, k: 40 }), `for “${text}”`));
}

function similar(match) {
  return attempt(async () => {
    show(await post("search", "/api/search", { row: match.row, k: 40 }), `similar to ${match.key}`);
    window.scrollTo({ top: 0 });
    $("results").querySelector("button")?.focus({ preventScroll: true });
  });
}

function bars(labels) {
  $("bars").replaceChildren(
    ...labels.map(({ label, probability }) => {
      const entry = document.createElement("li");
      const name = document.createElement("span");
      name.textContent = name.title = label;
      const meter = document.createElement("meter");
      meter.value = probability;
      meter.setAttribute("aria-label", label);
      const number = document.createElement("b");
      number.textContent = `${(100 * probability).toFixed(1)}%`;
      entry.append(name, meter, number);
      return entry;
    }),
  );
}

function classify() {
  const labels = $("labels").value.split(/[,\n]/).map((label) => label.trim()).filter(Boolean);
  if (!image || !labels.length) return bars([]);
  return attempt(async () => {
    const pairs = [...new Set(labels)].map((label) => ["labels", label]);
    const answer = await postImage("classify", "/api/classify", pairs);
    if (answer) bars(answer.labels);
  });
}

function useImage(file) {
  if (!file) return;
  if (file.type && !file.type.startsWith("image/")) return status(`${file.name} is not an image`, true);
  if (file.size > info.body_bytes) {
    const most = Math.floor(info.body_bytes / 2 ** 20);
    return status(`${file.name} is too large; at most ${most} MB are accepted`, true);
  }
  removeImage();
  image = file;
  $("query").value = "";
  $("preview").src = URL.createObjectURL(file);
  $("image").hidden = false;
  $("caption").textContent = "…";
  if (info.images) {
    status("Searching…");
    attempt(async () => show(await postImage("search", "/api/search", [["k", "40"]]), `similar to ${file.name}`));
  }
  if (info.captions) {
    attempt(async () => {
      const answer = await postImage("caption", "/api/caption");
      if (answer) $("caption").textContent = `${answer.caption} (probability ${Math.exp(answer.log_prob).toPrecision(2)})`;
    });
  }
  classify();
}

function removeImage() {
  for (const kind of ["search", "caption", "classify"]) running[kind]?.abort();
  if (image) URL.revokeObjectURL($("preview").src);
  image = null;
  $("image").hidden = true;
  $("file").value = "";
  bars([]);
}

function clearAll() {
  removeImage();
  $("query").value = "";
  searchText();
  $("query").focus();
}

/** Move the focus in the grid of results by whole rows and columns. */
function move(key) {
  const buttons = [...$("results").querySelectorAll("button")];
  const at = buttons.indexOf(document.activeElement);
  if (at < 0) return false;
  const columns = buttons.filter((b) => b.offsetTop === buttons[0].offsetTop).length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -at, End: buttons.length - 1 - at }[key];
  if (step === undefined) return false;
  const next = buttons[at + step];
  if (!next && key === "ArrowUp") $("query").focus();
  if (next) {
    buttons[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
  return true;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target instanceof HTMLInputElement;
  if (event.key === "/" && !typing) {
    event.preventDefault();
    $("query").select();
    $("query").focus();
  } else if (event.key === "Escape") {
    clearAll();
  } else if (event.key === "ArrowDown" && event.target === $("query")) {
    event.preventDefault();
    $("results").querySelector("button")?.focus();
  } else if (!typing && move(event.key)) {
    event.preventDefault();
  }
});

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(timer);
  searchText();
});
$("query").addEventListener("input", () => {
  clearTimeout(timer);
  if (image) removeImage();
  timer = setTimeout(searchText, DELAY);
});
$("labels").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(classify, 2 * DELAY);
});
$("file").addEventListener("change", () => useImage($("file").files[0]));
$("remove").addEventListener("click", clearAll);
$("results").addEventListener("error", (event) => {
  if (event.target instanceof HTMLImageElement) event.target.alt += " (not available)";
}, true);

const hasFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    $("drop").hidden = false;
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").hidden = true;
});
document.addEventListener("drop", (event) => {
  if (!hasFile(event)) return;
  event.preventDefault();
  $("drop").hidden = true;
  useImage(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((f) => f.type.startsWith("image/"));
  if (file) useImage(file);
});

attempt(async () => {
  info = await call("info", "/api/info");
  $("about").textContent = `${info.images.toLocaleString("en")} images · model ${info.model}`;
  $("query").disabled = !info.text_search;
  if (!info.text_search) {
    $("query").placeholder = info.images ? "This model has no texts; search by image" : "No index; drop an image";
  }
  $("captionbox").hidden = !info.captions;
  $("classifybox").hidden = !info.text_labels;
  const given = new URLSearchParams(location.hash.slice(1)).get("q");
  if (given && info.text_search) $("query").value = given;
  if (matchMedia("(hover: hover)").matches) $("query").focus();
  if (given) searchText();
});
