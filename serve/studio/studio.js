// The studio: asks the server that it came from, by OpenAI's image API, and keeps what was drawn in this browser.

const $ = (selector, root = document) => root.querySelector(selector);
const ROOT = new URL(".", location.href).href; // wherever the server is mounted
const KEPT = 100; // runs of the history; older ones stay where they have favourites
const PAGE = 8; // runs that are shown at once, before one scrolls to more
const THUMBNAIL = 320; // px of what a tile shows of a larger image
const UNDO_MS = 10_000;
const SEEDS = 2 ** 32;
const SQUARE = "1:1", SHAPES = [[SQUARE, "square"], ["4:3", "4:3"], ["16:9", "16:9"], ["3:4", "3:4"], ["9:16", "9:16"]];
const STAGES = {
  ar_prior: "imagining it", diffusion_prior: "imagining it", inversion: "reading the image", decoder: "drawing 64 px",
  upsampler_256: "growing to 256 px", upsampler_1024: "growing to 1024 px",
};
const ORDER = ["imagining it", "reading the image", "drawing 64 px", "growing to 256 px", "growing to 1024 px"];
const KINDS = { "images/generations": "drawn", "images/variations": "varied", "images/edits": "changed",
  "images/interpolations": "blended", own: "your own" };

const runs = new Map(); // by id: {id, at, title, caption, request: {path, fields, images}, shape, items, seconds, problem}
const elements = new Map(); // the article of each run
const favourites = new Map(); // by id of a run, also of one that is not shown yet: how many of its images
let older = []; // ids of runs in the database that are not shown yet, oldest first
const urls = new WeakMap(); // the address of each image, as long as it is in use
const stops = new Map(); // of each run that is drawn, what stops it
let model = { sides: [64, 256, 1024], priors: [], sampling: {} };
let viewed = null; // {run, index} in the viewer
let standard = {}; // where the model's own settings put the sliders

// --- the server -----------------------------------------------------------------------------------------------------

async function call(path, { json, form, signal } = {}) {
  const headers = json ? { "Content-Type": "application/json" } : {};
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  const body = json ? JSON.stringify(json) : form;
  const answer = await fetch(`${ROOT}${path}`, { method: body ? "POST" : "GET", headers, body, signal });
  if (answer.status === 401) {
    const door = $("#door");
    $("#refused").hidden = !token;
    $("#token").value = door.returnValue = "";
    await new Promise((entered) => { door.addEventListener("close", entered, { once: true }); door.showModal(); });
    if (door.returnValue !== "enter") throw new Error("This server wants a token.");
    sessionStorage.setItem("token", $("#token").value.replace(/[^\x20-\x7e]/g, "").trim()); // what a header can hold
    return call(path, { json, form, signal });
  }
  if (answer.ok) return answer;
  const { error } = await answer.json().catch(() => ({}));
  const wait = answer.headers.get("Retry-After");
  throw new Error(`${error?.message ?? `The server answered ${answer.status}.`}${wait ? ` Try again in ${wait} s.` : ""}`);
}

// A browser says of a server that is gone only that fetching failed, each in its own words.
const explained = (error) => (error instanceof TypeError ? "The server does not answer: is it still running?" : error.message);

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function asForm(fields, images) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  for (const [name, blob] of Object.entries(images)) form.append(name, blob, `${name}.png`);
  return form;
}

const png = (base64, type = "image/png") => new Blob([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], { type });

async function connect() {
  const { data } = await (await call("v1/models")).json();
  model = { ...model, ...data[0].unclip, id: data[0].id };
  const { sampling, sides, priors } = model;
  const sizes = [64, 256, 1024].filter((one) => one <= sides.at(-1));
  const side = model.device === "cpu" ? Math.min(256, sizes.at(-1)) : sizes.at(-1); // of four, a CPU takes long
  choices($("#sizes"), "size", sizes.map((s) => [`${s}x${s}`, `${s} px`]), `${side}x${side}`);
  choices($("#priors"), "prior", priors.map((p) => [p, p === "ar" ? "autoregressive" : p]), sampling.prior);
  $("#priors").hidden = priors.length < 2;
  toDefaults();
  const where = model.device === "cpu" ? "on a CPU" : "on a GPU";
  $("#server").textContent = `${model.id}, up to ${sides.at(-1)} px, ${where}`;
}

async function connectAtLast() {
  for (;;) {
    try {
      return await connect();
    } catch (error) {
      $("#server").textContent = `Not ready. ${explained(error)}`;
      await new Promise((wake) => setTimeout(wake, 2000));
    }
  }
}

// --- the history, in this browser -----------------------------------------------------------------------------------

const database = new Promise((resolve) => {
  const asked = indexedDB.open("unclip-studio", 1);
  asked.onupgradeneeded = () => asked.result.createObjectStore("runs", { keyPath: "id" });
  asked.onsuccess = () => resolve(asked.result);
  asked.onerror = () => resolve(null); // a private window may have none: then there is no history
});

async function history(mode, act) {
  const opened = await database;
  if (!opened) return null;
  return new Promise((resolve) => {
    const transaction = opened.transaction("runs", mode);
    const asked = act(transaction.objectStore("runs"));
    transaction.oncomplete = () => resolve(asked.result);
    transaction.onabort = () => resolve(null); // such as for want of room
  });
}

async function keep(run) {
  runs.set(run.id, run);
  star(run);
  navigator.storage?.persist?.(); // else a browser may drop all of it when its disk is full
  const put = () => history("readwrite", (table) => table.put(run));
  if (await put() === null && await database) tell("This browser has no room to keep it.");
  const large = run.items.filter((item) => item.side > THUMBNAIL && !item.thumbnail);
  for (const item of large) item.thumbnail = await shrunk(item.blob);
  if (large.length && runs.has(run.id)) await put(); // it may have been deleted meanwhile
  for (const id of [...older, ...runs.keys()].sort((a, b) => a - b).slice(0, -KEPT)) if (!favourites.has(id)) remove(id);
}

function star(run) {
  const count = run.items.filter((item) => item.favourite).length;
  count ? favourites.set(run.id, count) : favourites.delete(run.id);
  offerFavourites();
}

async function shrunk(blob) { // without it a tile of a 1024 px image takes four megabytes of pixels
  const bitmap = await createImageBitmap(blob, { resizeWidth: THUMBNAIL, resizeHeight: THUMBNAIL, resizeQuality: "high" });
  const canvas = make("canvas", { width: THUMBNAIL, height: THUMBNAIL });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
  return new Promise((resolve) => canvas.toBlob(resolve, "image/webp", 0.9));
}

function remove(id) {
  runs.get(id)?.items.forEach(release);
  runs.delete(id);
  favourites.delete(id);
  older = older.filter((one) => one !== id);
  elements.get(id)?.remove();
  elements.delete(id);
  history("readwrite", (table) => table.delete(id));
  emptiness();
}

async function more() { // shows the next runs of the history, newest first
  const ids = older.splice(-PAGE).reverse();
  for (const run of await Promise.all(ids.map((id) => history("readonly", (table) => table.get(id))))) {
    if (!run) continue; // another tab has deleted it
    runs.set(run.id, run);
    show(run, undefined, true);
  }
  if (older.length) watcher.observe($("#runs").lastElementChild ?? document.body);
}

const watcher = new IntersectionObserver((seen) => {
  if (!seen.some((one) => one.isIntersecting)) return;
  watcher.disconnect();
  more();
}, { rootMargin: "1000px" });

let undoing; // the timer that takes the offer back

function offer(text, undo) { // says what was deleted, and takes it back if it is asked to
  $("#undo span").textContent = text;
  $("#undo").hidden = false;
  clearTimeout(undoing);
  const close = () => { $("#undo").hidden = true; };
  undoing = setTimeout(close, UNDO_MS);
  $("#undo button").onclick = () => { close(); undo(); };
}

function removeWithUndo(run) {
  const next = elements.get(run.id)?.nextElementSibling;
  remove(run.id);
  offer(`Deleted: ${run.title}`, async () => {
    const article = show(run);
    next?.isConnected ? next.before(article) : $("#runs").append(article);
    await keep(run);
    $(".tile", article)?.focus();
  });
}

function emptiness() {
  const none = elements.size + older.length === 0;
  $("#empty").hidden = !none;
  $("#clear").hidden = none;
  offerFavourites();
}

// --- drawing --------------------------------------------------------------------------------------------------------

// Returns the error that ended it, null without one.
async function draw(title, path, fields, images = {}, caption = fields.prompt, shape = SQUARE) {
  const seed = fields.seed ?? Math.floor(Math.random() * SEEDS);
  const n = fields.n ?? 1;
  const request = { path, fields: { ...fields, n, seed }, images };
  const run = { id: Date.now() + Math.random(), at: Date.now(), title, caption, request, shape, seconds: 0, problem: "",
    items: Array.from({ length: n }, () => ({ blob: null, side: 0 })) };
  const stop = new AbortController();
  stops.set(run.id, stop);
  const article = show(run, stop);
  article.scrollIntoView({ behavior: "smooth", block: "nearest" });
  let failed = null;
  try {
    await receive(run, article, stop.signal);
  } catch (error) {
    failed = error;
    run.problem = stop.signal.aborted ? "Stopped." : explained(error);
  }
  stops.delete(run.id);
  if (!elements.has(run.id)) { // it was deleted meanwhile
    run.items.forEach(release);
    return failed;
  }
  run.seconds = (Date.now() - run.at) / 1000;
  run.items = run.items.filter((item) => item.blob);
  const inside = article.contains(document.activeElement);
  article.replaceWith(show(run));
  if (inside) $(".tile, .delete", elements.get(run.id)).focus();
  tell(run.problem || `${run.title}: ${run.items.length} drawn`);
  if (!run.items.length) return failed;
  await keep(run);
  if (run.items.some((item) => item.thumbnail) && elements.has(run.id)) fill(elements.get(run.id), run);
  return failed;
}

async function drawList(prompts) { // one after another: the server's queue is everybody's
  const say = (text) => Object.assign($("#listed"), { textContent: text, hidden: prompts.length < 2 });
  const shape = $("#compose").elements.shape.value;
  for (const [i, prompt] of prompts.entries()) {
    say(`Drawing caption ${i + 1} of ${prompts.length}.`);
    const failed = await draw(prompt, "images/generations", { prompt, ...settings() }, {}, prompt, shape);
    outputs();
    const over = failed && (failed.name === "AbortError" || failed instanceof TypeError); // stopped, or nobody answers
    if (over) return say(`Ended at caption ${i + 1} of ${prompts.length}; those after it are not drawn.`);
  }
  say(`All ${prompts.length} captions are done.`);
}

async function receive(run, article, signal) {
  const { path, fields, images } = run.request;
  const all = { ...fields, stream: true, partial_images: 2, progress: true };
  const sent = Object.keys(images).length ? { form: asForm(all, images) } : { json: all };
  let missing = run.items.length;
  for await (const event of events(await call(`v1/${path}`, { ...sent, signal }))) {
    if (event.error) throw new Error(event.error.message);
    const kind = event.type.split(".")[1];
    if (kind === "queued") said(article, event.place ? `${event.place} before yours` : "it is your turn");
    else if (kind === "step") said(article, STAGES[event.stage] ?? event.stage, event.step / event.steps);
    else if (event.b64_json) {
      const side = parseInt(event.size);
      const item = { blob: png(event.b64_json), side, partial: kind !== "completed", seed: event.seed, score: event.score };
      release(run.items[event.index ?? 0]);
      run.items[event.index ?? 0] = item;
      missing -= kind === "completed";
      fill(article, run);
      if ($("#viewer").open && viewed.run === run) viewed.index === (event.index ?? 0) ? portray() : around();
    }
  }
  if (missing) throw new Error("The server went away before all was drawn. Draw it again: what is done is kept.");
}

const tell = (text) => { $("#said").textContent = text; }; // to a screen reader

function said(article, text, share = 0) {
  $(".going span", article).textContent = text;
  const at = ORDER.indexOf(text);
  if (at >= 0) $("progress", article).value = (at + share) / ORDER.length;
}

// --- what was drawn -------------------------------------------------------------------------------------------------

function address(blob) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

function release({ blob, thumbnail }) {
  for (const one of [blob, thumbnail]) {
    URL.revokeObjectURL(urls.get(one));
    urls.delete(one);
  }
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function choices(group, name, options, chosen) {
  group.replaceChildren($("span", group), ...options.map(([value, text]) => make("label", { className: "choice" },
    make("input", { type: "radio", name, value, checked: value === chosen }), text)));
}

function show(run, stop, below = false) {
  const article = $("#a-run").content.firstElementChild.cloneNode(true);
  $("h3", article).textContent = run.title;
  $(".going", article).hidden = !stop;
  $(".stop", article).onclick = () => stop.abort();
  for (const name of [".again", ".delete"]) $(name, article).hidden = Boolean(stop);
  $(".again", article).hidden ||= run.request.path === "own";
  $(".again", article).onclick = () => {
    const { path, fields, images } = run.request;
    draw(run.title, path, { ...fields, seed: Math.floor(Math.random() * SEEDS) }, images, run.caption, run.shape);
  };
  $(".delete", article).onclick = () => { removeWithUndo(run); $("#undo button").focus(); };
  $(".problem", article).hidden = !run.problem;
  $(".problem", article).textContent = run.problem;
  fill(article, run);
  if (!elements.has(run.id)) $("#runs")[below ? "append" : "prepend"](article);
  elements.set(run.id, article);
  emptiness();
  return article;
}

function fill(article, run) {
  const { path, fields } = run.request;
  const when = new Date(run.at).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  const took = run.seconds ? `in ${run.seconds.toFixed(1)} s` : "";
  const side = fields.size === "auto" ? run.items[0]?.side : fields.size?.split("x")[0];
  const facts = [run.problem && !run.items.length ? "nothing drawn" : KINDS[path], side && size(side, run.shape), took, when];
  $("header p", article).textContent = facts.filter(Boolean).join(" · ");
  const best = Math.max(...run.items.map((item) => item.score ?? -1));
  const tiles = run.items.map((item, index) => {
    if (!item.blob) return make("div", { className: "tile" }, make("div", { className: "wait" }));
    const image = make("img", { loading: "lazy", decoding: "async", src: address(item.thumbnail ?? item.blob), alt: `${described(run, index)}${item.favourite ? ", favourite" : ""}`, className: item.side < 200 ? "small" : "" });
    image.style.aspectRatio = (run.shape ?? SQUARE).replace(":", "/");
    const score = item.score == null ? "" : `score ${item.score.toFixed(3)}`;
    const nearest = run.items.length > 1 && item.score === best && !item.partial;
    const note = make("span", {}, item.partial ? `${item.side} px so far` : score, nearest ? make("b", {}, "nearest") : "");
    return make("button", { type: "button", className: `tile${item.favourite ? " favourite" : ""}`, onclick: () => view(run, index) }, image, note);
  });
  const focused = [...$(".tiles", article).children].indexOf(document.activeElement);
  $(".tiles", article).replaceChildren(...tiles);
  if (focused >= 0) tiles[focused].focus();
}

const described = (run, index) => `${run.title}, image ${index + 1} of ${run.items.length}`;

// --- one picture ----------------------------------------------------------------------------------------------------

function view(run, index) {
  const item = run.items[index];
  if (!item?.blob) return;
  viewed = { run, index };
  $("#viewed").textContent = run.title;
  portray();
  around();
  const caption = run.caption ?? "";
  $("#tool-words [name=caption]").value = $("#tool-mask [name=prompt]").value = caption;
  $("#tool-words [name=prompt]").value = "";
  const others = [...runs.values()].reverse().flatMap((other) => other.items.map((one, at) => ({ other, one, at })))
    .filter(({ one }) => one.blob && one !== item).slice(0, 60);
  $("#others").replaceChildren(...others.map(({ other, one, at }, place) => make("label", { className: "pick" },
    make("input", { type: "radio", name: "other", value: `${other.id}/${at}`, required: true, checked: place === 0 }),
    make("img", { loading: "lazy", src: address(one.thumbnail ?? one.blob), alt: described(other, at) }))));
  if (!others.length) $("#others").append(make("p", {}, "Draw or drop another image first."));
  $("#tool-between button").disabled = !others.length;
  $("#recipe").textContent = run.request.path === "own" ? "An image of your own." : JSON.stringify(exact(), null, 1);
  for (const button of document.querySelectorAll("[data-copy]")) button.hidden = run.request.path === "own";
  $("#copied").textContent = "";
  unpaint();
  $("#learnt").replaceChildren();
  if ($("#tool-learnt").open) learnt();
  if (!$("#viewer").open) $("#viewer").showModal();
}

function around() { // offers the images before and after the one that is viewed, as far as they are drawn
  const { run, index } = viewed;
  for (const [button, to] of [["#previous", index - 1], ["#next", index + 1]]) {
    const there = Boolean(run.items[to]?.blob);
    if (!there && document.activeElement === $(button)) $("#close").focus(); // else no key is heard any more
    $(button).disabled = !there;
    $(button).onclick = () => view(run, to);
  }
}

function portray() { // shows the image that is viewed, which may grow
  const { run, index } = viewed, item = run.items[index];
  const shape = canvas.hidden ? run.shape ?? SQUARE : SQUARE; // a mask is painted on all of the square
  Object.assign($("#large"), { src: address(item.blob), alt: described(run, index), className: item.side < 200 ? "small" : "" });
  Object.assign($("#large").style, { aspectRatio: shape.replace(":", "/"), objectFit: "cover" });
  const facts = [`${size(item.side, shape)}${item.partial ? " so far" : ""}`, shape !== SQUARE && "cut from the middle of a square", item.seed != null && `seed ${item.seed}`, item.score != null && `score ${item.score.toFixed(3)}: how near it is to the caption`];
  $("#about").textContent = facts.filter(Boolean).join(" · ");
  $("#download").href = address(item.blob);
  $("#download").download = fileName(run, item, index);
  $("#download").onclick = run.shape && run.shape !== SQUARE ? async (event) => {
    event.preventDefault();
    save(await shaped(item.blob, run.shape), fileName(run, item, index));
  } : null;
  $("#enlarge").hidden = item.partial || run.request.path === "own" || item.side >= model.sides.at(-1);
  $("#enlarge").textContent = `Make it ${model.sides.at(-1)} px`;
  $("#pick").hidden = item.partial;
  $("#pick").setAttribute("aria-pressed", Boolean(item.favourite));
}

function fileName(run, item, index) {
  return `${(run.title.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["image"]).join("-").slice(0, 60)}-${item.seed ?? index}.png`;
}

function enlarge() { // the same recipe at the largest size: what is smaller of it comes out as it is
  const { run, index } = viewed, { path, fields, images } = run.request, item = run.items[index];
  const large = { ...fields, size: `${model.sides.at(-1)}x${model.sides.at(-1)}` };
  // The images of a way are one drawing; of a change each is a share of the turn.
  if (path !== "images/interpolations") Object.assign(large, { n: 1, seed: item.seed ?? fields.seed });
  if (fields.before !== undefined) large.strength = (fields.strength * (index + 1)) / fields.n;
  draw(run.title, path, large, images, run.caption, run.shape);
  $("#viewer").close();
}

function pick() {
  const { run, index } = viewed, item = run.items[index];
  item.favourite = !item.favourite;
  $("#pick").setAttribute("aria-pressed", item.favourite);
  if (elements.has(run.id)) fill(elements.get(run.id), run);
  keep(run);
}

function use(event) {
  event.preventDefault();
  const form = event.target, { run, index } = viewed, item = run.items[index];
  const given = Object.fromEntries([...new FormData(form)].map(([k, v]) => [k, Number.isNaN(Number(v)) || !v ? v : Number(v)]));
  const size = `${item.side}x${item.side}`;
  const image = item.blob;
  const shown = settings();
  const common = { size: run.request.path === "own" ? shown.size : size, seed: shown.seed, ...(shown.steps && { steps: shown.steps }) };
  const text = (name) => String(form.elements[name].value).trim();
  if (form.dataset.tool === "vary") draw(run.title, "images/variations", { ...common, n: given.n, eta: given.eta }, { image }, run.caption, run.shape);
  if (form.dataset.tool === "words") {
    const fields = { ...common, n: given.n, prompt: text("prompt"), before: text("caption"), strength: given.strength };
    draw(text("prompt"), "images/edits", fields, { image }, fields.prompt, run.shape);
  }
  if (form.dataset.tool === "between") {
    const [id, at] = String(form.elements.other.value).split("/");
    const other = runs.get(Number(id));
    draw(`${run.title} → ${other.title}`, "images/interpolations", { ...common, n: given.n }, { first: image, second: other.items[at].blob }, undefined, run.shape);
  }
  if (form.dataset.tool === "mask") {
    const problem = painted ? "" : "Paint over a part of the image first.";
    form.elements.prompt.setCustomValidity(problem);
    if (problem) { form.elements.prompt.reportValidity(); form.elements.prompt.setCustomValidity(""); return; }
    const { guidance, prior } = shown;
    const fields = { ...common, ...(guidance !== undefined && { guidance }), ...(prior && { prior }), n: given.n, prompt: text("prompt") };
    cut().then((mask) => draw(fields.prompt, "images/edits", fields, { image, mask }, fields.prompt, run.shape));
  }
  $("#viewer").close();
}

async function learnt() {
  const { run, index } = viewed;
  $("#learnt-says").textContent = "Looking …";
  try {
    const form = asForm({ n: 8 }, { image: run.items[index].blob });
    const { data } = await (await call("v1/unclip/nearest", { form })).json();
    if (viewed.run !== run || viewed.index !== index) return;
    $("#learnt-says").textContent = data.length ? "" : "The index holds no image.";
    $("#learnt").replaceChildren(...data.map((row) => make("li", {},
      row.b64_json ? make("img", { src: address(png(row.b64_json, "image/jpeg")), alt: row.caption })
        : make("p", { className: "none" }, "Its licence does not let it be shown."),
      make("p", { className: "what" }, row.caption),
      make("p", {}, `${Math.round(row.similarity * 100)}% alike · ${row.license ?? "licence not named"}`),
      make("p", {}, row.attribution ?? ""),
      row.url ? make("p", {}, make("a", { href: row.url, rel: "noreferrer", target: "_blank" }, "where it is from")) : "")));
  } catch (error) {
    $("#learnt-says").textContent = explained(error);
  }
}

// --- the mask: painted pixels are drawn again -----------------------------------------------------------------------

const SIDE = 512; // of the mask
let painted = false, at = { x: SIDE / 2, y: SIDE / 2 };
const canvas = $("#mask"), pen = canvas.getContext("2d");

function unpaint() {
  canvas.width = canvas.height = SIDE;
  painted = false;
  at = { x: SIDE / 2, y: SIDE / 2 };
}

function paint(to) {
  painted = true;
  pen.lineCap = pen.lineJoin = "round";
  pen.strokeStyle = "rgb(111 208 189)";
  pen.lineWidth = (SIDE * $("#tool-mask [name=brush]").value) / 100;
  pen.beginPath();
  pen.moveTo(at.x, at.y);
  pen.lineTo(to.x + 0.01, to.y);
  pen.stroke();
  at = to;
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return { x: ((event.clientX - box.left) / box.width) * SIDE, y: ((event.clientY - box.top) / box.height) * SIDE };
}

function byKey(event) {
  const step = SIDE / (event.shiftKey ? 8 : 32);
  const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] }[event.key] ?? [];
  if (x === undefined) return;
  event.preventDefault();
  event.stopPropagation();
  const to = { x: Math.min(SIDE, Math.max(0, at.x + x * step)), y: Math.min(SIDE, Math.max(0, at.y + y * step)) };
  if (event.key === " " || event.ctrlKey) paint(to);
  at = to;
  $("#about").textContent = `brush at ${Math.round((100 * at.x) / SIDE)}% from the left, ${Math.round((100 * at.y) / SIDE)}% from the top`;
}

function cut() {
  const out = make("canvas", { width: SIDE, height: SIDE });
  const knife = out.getContext("2d");
  knife.fillRect(0, 0, SIDE, SIDE);
  knife.globalCompositeOperation = "destination-out";
  knife.drawImage(canvas, 0, 0);
  return new Promise((resolve) => out.toBlob(resolve));
}

// --- taking it along ------------------------------------------------------------------------------------------------

function exact() {
  const { path, fields } = viewed.run.request, item = viewed.run.items[viewed.index];
  const seed = item.seed ?? fields.seed + viewed.index; // one that was stopped halfway has not been told
  const together = path === "images/interpolations" || fields.before !== undefined; // one seed, further and further
  return together ? { path, ...fields } : { path, ...fields, n: 1, seed };
}

function command() {
  const { path, ...fields } = { ...exact(), response_format: "url" }, images = Object.keys(viewed.run.request.images);
  const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;
  const key = sessionStorage.getItem("token") ? ' -H "Authorization: Bearer $UNCLIP_TOKEN"' : "";
  const body = images.length
    ? [...images.map((name) => `-F ${name}=@${name}.png`), ...Object.entries(fields).map(([k, v]) => `--form-string ${quoted(`${k}=${v}`)}`)].join(" ")
    : `-H 'Content-Type: application/json' -d ${quoted(JSON.stringify(fields))}`;
  return `curl -s ${ROOT}v1/${path}${key} ${body} | grep -o 'http[^"]*png' | xargs -n 1 curl -sO`;
}

function python() {
  const { path, ...fields } = exact(), images = Object.keys(viewed.run.request.images);
  const method = { "images/generations": "generate", "images/variations": "create_variation", "images/edits": "edit" }[path];
  const own = new Set(["prompt", "n", "size"]);
  const text = (value) => (typeof value === "string" ? JSON.stringify(value) : value);
  const extra = Object.entries(fields).filter(([k]) => !own.has(k)).map(([k, v]) => `"${k}": ${text(v)}`).join(", ");
  const files = images.map((name) => `"${name}": open("${name}.png", "rb")`).join(", ");
  if (!method) {
    const all = Object.entries(fields).map(([k, v]) => `"${k}": ${text(v)}`).join(", ");
    return `import os\n\nimport httpx\n\nmade = httpx.post(\n    "${ROOT}v1/${path}",\n    data={${all}, "response_format": "url"},\n    files={${files}},\n    headers={"Authorization": "Bearer " + os.environ.get("UNCLIP_TOKEN", "none")},\n    timeout=600,\n).json()\n`
      + `for i, image in enumerate(made["data"]):\n    with open(f"drawn-{i}.png", "wb") as file:\n        file.write(httpx.get(image["url"]).content)\n`;
  }
  const words = [...images.map((name) => `${name}=open("${name}.png", "rb")`),
    ...Object.entries(fields).filter(([k]) => own.has(k)).map(([k, v]) => `${k}=${text(v)}`), `extra_body={${extra}}`];
  return `import base64\nimport os\n\nfrom openai import OpenAI\n\nclient = OpenAI(base_url="${ROOT}v1", api_key=os.environ.get("UNCLIP_TOKEN", "none"))\n`
    + `made = client.images.${method}(\n${words.map((word) => `    ${word},\n`).join("")})\n`
    + `for i, image in enumerate(made.data):\n    with open(f"drawn-{i}.png", "wb") as file:\n        file.write(base64.b64decode(image.b64_json))\n`;
}

async function copy(what) {
  const text = what === "python" ? python() : command(), images = viewed.run.request.images;
  $("#recipe").textContent = text;
  try {
    await navigator.clipboard.writeText(text);
    $("#copied").textContent = "Copied.";
  } catch { // not every page may: one that did not come by https from another machine
    getSelection().selectAllChildren($("#recipe"));
    $("#copied").textContent = "It is selected below: copy it from there.";
  }
  for (const [name, blob] of Object.entries(images)) {
    $("#copied").append(" ", make("a", { href: address(blob), download: `${name}.png` }, `It needs ${name}.png.`));
  }
}

// --- what is asked --------------------------------------------------------------------------------------------------

function settings() {
  const form = $("#compose").elements, { sampling } = model;
  if ($("#fresh").checked) $("#seed").value = Math.floor(Math.random() * SEEDS);
  const fields = { n: Number(form.n.value), size: form.size?.value ?? "auto", seed: Number(form.seed.value) };
  if (!model.id) return fields; // not known yet: it draws as it does by itself
  for (const name of ["steps", "guidance"]) if (form[name].value !== standard[name]) fields[name] = Number(form[name].value);
  if (form.prior?.value && form.prior.value !== sampling.prior) fields.prior = form.prior.value;
  return fields;
}

function toDefaults() {
  if (!model.id) return; // not known yet
  const form = $("#compose").elements, { sampling } = model;
  for (const name of ["steps", "guidance"]) {
    const own = sampling[`decoder_${name}`];
    form[name].max = Math.max(form[name].max, Math.ceil(own));
    form[name].value = own;
    standard[name] = form[name].value; // which a slider rounds
  }
  form.n.value = 4;
  for (const radio of document.querySelectorAll("[name=prior]")) radio.checked = radio.value === sampling.prior;
  outputs();
}

function outputs() {
  for (const range of document.querySelectorAll("input[type=range]")) {
    const suffix = range.name === "brush" ? "%" : "";
    $(`output[for="${range.id}"]`).textContent = `${range.value}${suffix}`;
  }
  const form = $("#compose").elements;
  const seed = $("#fresh").checked ? "a new seed" : `seed ${form.seed.value}`;
  const shape = form.shape.value === SQUARE ? "" : form.shape.value;
  $("#summary").textContent = [`${form.n.value} images`, form.size?.value.split("x")[0].concat(" px"), shape, seed].filter(Boolean).join(", ");
}

// --- the recipe in a file, and files in a zip -----------------------------------------------------------------------

const CHUNKS = 16, CHUNK_BYTES = 1 << 16; // of a PNG that are looked at: it may be anybody's

async function recipe(file) { // what the text chunks of a PNG of this software say; null without them
  const found = {};
  for (const chunk of textChunks(new Uint8Array(await file.slice(0, CHUNKS * CHUNK_BYTES).arrayBuffer()))) {
    const name = chunk.indexOf(0, 8), text = (from, to) => new TextDecoder().decode(chunk.subarray(from, to));
    if (name > 0) found[text(8, name)] ??= text(name + 5, chunk.length - 4);
  }
  try {
    const made = JSON.parse(found.made ?? "{}"), settings = JSON.parse(found.settings), seed = Number(found.seed);
    const whole = [made, settings].every((one) => one && typeof one === "object") && Number.isSafeInteger(seed);
    return whole ? { caption: found.caption, seed, settings, made } : null;
  } catch {
    return null;
  }
}

function adopt({ caption, seed, settings, made }, name) { // puts a recipe into the form, as far as this model can take it
  const form = $("#compose").elements, side = made.side ?? settings.size;
  if (caption) $("#caption").value = String(caption).replace(/[\r\n]+/g, " ").slice(0, 1000); // a line is a caption
  if (seed >= 0) [form.seed.value, $("#fresh").checked] = [seed, false];
  form.n.value = 1;
  for (const option of ["steps", "guidance"]) {
    const value = settings[`decoder_${option}`];
    if (typeof value === "number" && value <= 1000) [form[option].max, form[option].value] = [Math.max(form[option].max, value), value];
  }
  for (const [radios, value] of [["size", `${side}x${side}`], ["prior", settings.prior]]) {
    for (const radio of document.querySelectorAll(`[name=${radios}]`)) if (radio.value === value) radio.checked = true;
  }
  $("#settings").open = true;
  outputs();
  const other = made.bundle && made.bundle !== model.bundle ? " Another model drew it, so it will look different." : "";
  const begun = (made.operation ?? "draw") === "draw" ? "" : " It began with an image of its own: open it to do that again.";
  $("#adopted").textContent = `The recipe of ${name || "the image"} is in the form.${other}${begun}`;
  $("#adopted").hidden = false;
}

function* textChunks(bytes) { // each whole, with its length, kind and checksum
  if (String.fromCharCode(...bytes.subarray(1, 4)) !== "PNG") return;
  const view = new DataView(bytes.buffer);
  for (let at = 8, i = 0; i < CHUNKS && at + 8 < bytes.length; i++) {
    const size = view.getUint32(at), kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    if (kind === "IDAT") return;
    if (kind === "iTXt" && size <= CHUNK_BYTES) yield bytes.subarray(at, at + 12 + size);
    at += 12 + size;
  }
}

function sides(side, shape) { // width and height of a shape that is cut from a square
  const [w, h] = shape.split(":").map(Number);
  return [Math.round(side * Math.min(1, w / h)), Math.round(side * Math.min(1, h / w))];
}

const size = (side, shape = SQUARE) => (shape === SQUARE ? `${side} px` : `${sides(side, shape).join(" × ")} px`);

async function shaped(blob, shape = SQUARE) { // cut from the middle, with the recipe of the square
  if (shape === SQUARE) return blob;
  const bitmap = await createImageBitmap(blob), [width, height] = sides(bitmap.width, shape);
  const canvas = make("canvas", { width, height });
  canvas.getContext("2d").drawImage(bitmap, Math.floor((width - bitmap.width) / 2), Math.floor((height - bitmap.height) / 2));
  bitmap.close();
  const bytes = async (one) => new Uint8Array(await one.arrayBuffer());
  const image = await bytes(await new Promise((resolve) => canvas.toBlob(resolve)));
  const HEADER = 33; // bytes before the second chunk
  return new Blob([image.subarray(0, HEADER), ...textChunks(await bytes(blob)), image.subarray(HEADER)], { type: "image/png" });
}

const CRC = Uint32Array.from({ length: 256 }, (_, n) => Array.from({ length: 8 }).reduce((c) => (c & 1 ? 0xedb88320 ^ (c >>> 1) : c >>> 1), n));

async function zipped(files) { // [name, blob] as one file; images are compressed already
  const parts = [], index = [];
  let at = 0;
  for (const [name, blob] of files) {
    const bytes = new Uint8Array(await blob.arrayBuffer()), title = new TextEncoder().encode(name);
    const crc = ~bytes.reduce((sum, byte) => CRC[(sum ^ byte) & 255] ^ (sum >>> 8), -1) >>> 0;
    const shared = [[0x800, 2], [0, 2], [0, 2], [0x21, 2], [crc, 4], [bytes.length, 4], [bytes.length, 4], [title.length, 2], [0, 2]];
    parts.push(numbers([0x04034b50, 4], [20, 2], ...shared), title, bytes);
    index.push(numbers([0x02014b50, 4], [20, 2], [20, 2], ...shared, [0, 2], [0, 2], [0, 2], [0, 4], [at, 4]), title);
    at += 30 + title.length + bytes.length;
  }
  const size = index.reduce((sum, part) => sum + part.length, 0);
  const end = numbers([0x06054b50, 4], [0, 2], [0, 2], [files.length, 2], [files.length, 2], [size, 4], [at, 4], [0, 2]);
  return new Blob([...parts, ...index, end], { type: "application/zip" });
}

function numbers(...fields) { // little-endian, each with its number of bytes
  return Uint8Array.from(fields.flatMap(([value, bytes]) => Array.from({ length: bytes }, (_, i) => (value >>> (8 * i)) & 255)));
}

function offerFavourites() { // says how many there are, also further down
  const count = [...favourites.values()].reduce((sum, one) => sum + one, 0);
  $("#take-favourites").hidden = !count;
  $("#take-favourites").textContent = `Download ${count} favourite${count === 1 ? "" : "s"}`;
}

async function takeFavourites() {
  const files = new Map();
  for (const id of favourites.keys()) {
    const run = runs.get(id) ?? (await history("readonly", (table) => table.get(id)));
    for (const [index, item] of (run?.items ?? []).entries()) {
      if (!item.favourite || !item.blob) continue;
      let name = fileName(run, item, index);
      for (let i = 2; files.has(name); i++) name = fileName(run, item, index).replace(/\.png$/, `-${i}.png`);
      files.set(name, await shaped(item.blob, run.shape));
    }
  }
  save(await zipped([...files]), "unclip.zip");
}

function save(blob, name) { // as a download
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// --- an image of one's own ------------------------------------------------------------------------------------------

async function takeIn(file) {
  $("#problem").hidden = $("#adopted").hidden = true;
  try {
    const carried = await recipe(file);
    const bitmap = await createImageBitmap(file); // upright; the model sees the square in the middle
    const short = Math.min(bitmap.width, bitmap.height), side = Math.min(short, 1024);
    const square = make("canvas", { width: side, height: side });
    square.getContext("2d").drawImage(bitmap, (bitmap.width - short) / 2, (bitmap.height - short) / 2, short, short, 0, 0, side, side);
    const blob = await new Promise((resolve) => square.toBlob(resolve));
    const title = file.name?.replace(/\.\w+$/, "") || "An image of your own";
    const run = { id: Date.now() + Math.random(), at: Date.now(), title, seconds: 0, problem: "",
      request: { path: "own", fields: {}, images: {} }, items: [{ blob: carried && bitmap.width === side && bitmap.height === side ? file : blob, side }] };
    if (carried?.caption) run.caption = carried.caption.slice(0, 1000);
    show(run);
    await keep(run);
    if (carried) adopt(carried, file.name);
    else view(run, 0);
  } catch {
    $("#problem").textContent = `${file.name || "This"} is not an image that this browser can open: take a PNG, JPEG or WebP.`;
    $("#problem").hidden = false;
  }
}

$("#compose").addEventListener("submit", (event) => {
  event.preventDefault();
  drawList($("#caption").value.split("\n").map((line) => line.trim()).filter(Boolean));
});
$("#caption").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("#compose").requestSubmit();
});
document.addEventListener("input", outputs);
$("#seed").addEventListener("input", () => { $("#fresh").checked = false; });
$("#defaults").addEventListener("click", toDefaults);
$("#own").addEventListener("change", (event) => { [...event.target.files].forEach(takeIn); event.target.value = ""; });
document.addEventListener("paste", (event) => [...event.clipboardData.files].forEach(takeIn));
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.toggle("dropping", over);
    if (name === "drop") [...event.dataTransfer.files].forEach(takeIn);
  });
}
$("#clear").addEventListener("click", () => { 
  if (!confirm("Delete all images that this browser keeps, favourites included?")) return;
  for (const stop of stops.values()) stop.abort();
  [...elements.keys()].forEach(remove);
  older = [];
  favourites.clear();
  emptiness();
  history("readwrite", (table) => table.clear()); // also what another tab has drawn since
});
$("#take-favourites").addEventListener("click", takeFavourites);
$("#enlarge").addEventListener("click", enlarge);
$("#pick").addEventListener("click", pick);
$("#close").addEventListener("click", () => $("#viewer").close());
$("#delete-one").addEventListener("click", () => {
  const { run, index } = viewed;
  $("#viewer").close();
  if (run.items.length === 1) removeWithUndo(run);
  else {
    const before = run.items;
    const change = (items) => { run.items = items; elements.get(run.id).replaceWith(show(run)); return keep(run); };
    change(before.toSpliced(index, 1));
    offer("Deleted: one image", () => change(before));
  }
  $("#undo button").focus();
});
let pressed = null; // where a click in the viewer began: text may be selected beyond its edge
$("#viewer").addEventListener("pointerdown", (event) => { pressed = event.target; });
$("#viewer").addEventListener("click", (event) => { if (event.target === $("#viewer") && pressed === event.target) $("#viewer").close(); });
document.addEventListener("keydown", (event) => {
  if (!$("#viewer").open) return;
  const button = { ArrowLeft: "#previous", ArrowRight: "#next" }[event.key];
  if (button && !["INPUT", "CANVAS", "PRE"].includes(event.target.tagName)) $(button).click();
});
$("#viewer").addEventListener("submit", use);
$("#tool-learnt").addEventListener("toggle", (event) => { if (event.target.open && !$("#learnt").children.length) learnt(); });
$("#tool-mask").addEventListener("toggle", (event) => { canvas.hidden = !event.target.open; if (viewed) portray(); });
$("#unpaint").addEventListener("click", unpaint);
for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button.dataset.copy));
canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); at = place(event); paint(at); });
canvas.addEventListener("pointermove", (event) => { if (event.buttons) paint(place(event)); });
canvas.addEventListener("keydown", byKey);

choices($("#shapes"), "shape", SHAPES, SQUARE);
outputs();
unpaint();
connectAtLast();
const earlier = (await history("readonly", (table) => table.getAll())) ?? [];
earlier.forEach(star);
older = earlier.map((run) => run.id);
await more();
emptiness();
