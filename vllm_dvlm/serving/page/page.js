"use strict";
// Asks the server that this page comes from, and draws what its stream shows (diffusion_stream: provisional).

const $ = (selector, root = document) => root.querySelector(selector);
const OFF = "off";
const SPECIAL = /^<\|.*\|>$/;
const PATIENCE_MS = 50;

// name, label, minimum, maximum, step, value that leaves the option out
const SLIDERS = [
  ["max_tokens", "Canvas", 4, 256, 4, null],
  ["diffusion_block_length", "Block", 0, 256, 4, 0],
  ["diffusion_max_steps", "Steps", 0, 256, 1, 0],
  ["diffusion_refresh_interval", "Refresh every", 1, 64, 1, 1],
  ["diffusion_threshold", "Threshold", 0, 4, 0.1, 0],
  ["prune_keep_ratio", "Keep", 0.02, 1, 0.01, null],
];
const RECIPES = {
  exact: { label: "exact", options: {} },
  cached: { label: "cached", options: { diffusion_refresh_interval: 32 }, needs: "has_refresh" },
  threshold: { label: "cached + threshold", options: { diffusion_refresh_interval: 32, diffusion_threshold: 1 }, needs: "has_refresh" },
  fast: { label: "threshold", options: { diffusion_threshold: 1 }, needs: "has_threshold" },
  pruned: { label: "+ RedVTP ¼", options: { prune_method: "redvtp", prune_keep_ratio: 0.25 } },
  pruned_cached: { label: "cached + RedVTP ¼", options: { prune_method: "redvtp", prune_keep_ratio: 0.25, diffusion_refresh_interval: 32 }, needs: "has_refresh" },
  own: { label: "own settings", options: null },
};

const state = { about: null, picture: null, image: null, panes: [] };
window.dvlm = state;

class Pane {
  constructor(number) {
    this.number = number;
    this.values = { max_tokens: 32, diffusion_block_length: 0, diffusion_max_steps: 0, diffusion_refresh_interval: 1, diffusion_threshold: 0, prune_keep_ratio: 0.5, prune_method: "none" };
    this.recipe = number === 0 ? "exact" : "pruned";
    this.delays = [];
    this.root = $("#pane").content.firstElementChild.cloneNode(true);
    $("h2", this.root).textContent = number === 0 ? "First setting" : "Second setting";
    this.buildSettings();
    this.choose(this.recipe);
  }

  buildSettings() {
    const select = $("[name=recipe]", this.root);
    select.id = `recipe-${this.number}`;
    select.previousElementSibling.htmlFor = select.id;
    for (const [name, recipe] of Object.entries(RECIPES)) {
      if (!recipe.needs || state.about[recipe.needs]) select.add(new Option(recipe.label, name));
    }
    select.addEventListener("change", () => { this.choose(select.value); remember(); });
    const box = $(".sliders", this.root);
    for (const [name, label, min, max, step] of SLIDERS) {
      if (name === "diffusion_refresh_interval" && !state.about.has_refresh) continue;
      if (name === "diffusion_threshold" && !state.about.has_threshold) continue;
      if (name === "diffusion_block_length" && !state.about.has_blocks) continue;
      const input = Object.assign(document.createElement("input"), { type: "range", min, max, step, id: `${name}-${this.number}`, name });
      this.field(box, input, label);
    }
    const method = document.createElement("select");
    method.id = `prune_method-${this.number}`;
    method.name = "prune_method";
    for (const each of state.about.prune_methods) method.add(new Option(each, each));
    this.field(box, method, "Pruning");
  }

  field(box, input, text) {
    const outer = document.createElement("div");
    const label = document.createElement("label");
    const shown = document.createElement("output");
    label.htmlFor = input.id;
    label.append(text, " ", shown);
    outer.append(label, input);
    box.append(outer);
    input.addEventListener("input", () => {
      this.values[input.name] = input.type === "range" ? Number(input.value) : input.value;
      this.recipe = "own";
      this.showSettings();
      remember();
    });
  }

  choose(recipe) {
    if (!RECIPES[recipe] || (RECIPES[recipe].needs && !state.about[RECIPES[recipe].needs])) recipe = "exact";
    this.recipe = recipe;
    const options = RECIPES[recipe].options;
    if (options) {
      Object.assign(this.values, { diffusion_refresh_interval: 1, diffusion_threshold: 0, prune_method: "none", prune_keep_ratio: 0.5 }, options);
    }
    this.showSettings();
  }

  showSettings() {
    $("[name=recipe]", this.root).value = this.recipe;
    for (const input of this.root.querySelectorAll(".sliders input, .sliders select")) {
      const value = this.values[input.name];
      input.value = value;
      const off = SLIDERS.find(([name]) => name === input.name)?.[5];
      const shown = $("output", input.parentElement);
      if (input.type === "range") shown.textContent = value === off ? OFF : value;
    }
    this.showRequest();
  }

  options() {
    const found = {};
    for (const [name, , , , , off] of SLIDERS) {
      if (name === "max_tokens" || name === "prune_keep_ratio" || this.values[name] === off) continue;
      found[name] = this.values[name];
    }
    if (this.values.prune_method !== "none") {
      found.prune_method = this.values.prune_method;
      found.prune_keep_ratio = this.values.prune_keep_ratio;
    }
    return found;
  }

  body(picture) {
    const content = [{ type: "text", text: $("#question").value }];
    if (picture) content.unshift({ type: "image_url", image_url: { url: picture } });
    return {
      model: state.about.model,
      messages: [{ role: "user", content }],
      max_tokens: this.values.max_tokens,
      temperature: 0,
      stream: true,
      vllm_xargs: { ...this.options(), diffusion_stream: "provisional" },
    };
  }

  showRequest() {
    const body = JSON.stringify(this.body(state.picture ? "data:image/png;base64,PICTURE" : null), null, 1);
    const url = `${location.origin}/v1/chat/completions`;
    const quoted = body.replaceAll("'", "'\\''").replace("PICTURE", "'$(base64 -w0 picture.png)'");
    $(".curl", this.root).textContent = `curl -N ${url} -H 'Content-Type: application/json' -d '${quoted}'`;
    const read = state.picture ? 'import base64\n\npicture = base64.b64encode(open("picture.png", "rb").read()).decode()\n' : "";
    const python = body.replace('"data:image/png;base64,PICTURE"', '"data:image/png;base64," + picture')
      .replaceAll(": true", ": True");
    $(".python", this.root).textContent = `import httpx\n${read}body = ${python}\nwith httpx.stream("POST", "${url}", json=body, timeout=None) as reply:\n    for line in reply.iter_lines():\n        print(line)`;
  }

  async ask(signal) {
    Object.assign(this, { text: "", cells: [], offset: 0, began: performance.now(), report: null, pruned: null, last: null, queue: [], drawing: null });
    this.delays = [];
    $(".answer", this.root).textContent = "";
    $(".error", this.root).textContent = "";
    $(".cells", this.root).replaceChildren();
    $(".numbers", this.root).replaceChildren();
    this.say("asked");
    this.drawPicture();
    try {
      const reply = await fetch("v1/chat/completions", {
        method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(this.body(state.picture)),
      });
      if (!reply.ok) throw new Error((await reply.json()).error?.message ?? reply.statusText);
      await this.read(reply.body.getReader());
      this.answered = performance.now();
      await this.finish();
    } catch (error) {
      this.queue.length = 0;
      if (error.name === "AbortError") { this.say("stopped"); return; }
      $(".error", this.root).textContent = error.message;
      this.say("failed");
    }
  }

  async read(reader) {
    const decoder = new TextDecoder();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      const events = rest.split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        this.take(JSON.parse(data));
      }
    }
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    const choice = chunk.choices?.[0];
    if (chunk.kv_transfer_params) this.report = chunk.kv_transfer_params.dvlm;
    if (!choice) return;
    this.text += choice.delta.content ?? "";
    const shown = choice.delta.diffusion;
    if (shown?.event === "pruned") { this.pruned = shown; this.drawPicture(); }
    if (shown?.event === "snapshot") {
      this.queue.push(shown);
      this.drawing ??= this.drawQueue();
    }
    if (choice.delta.content) $(".answer", this.root).textContent = this.text;
  }

  // One snapshot a frame, so that steps of few milliseconds are seen; those that have waited too long are left out.
  async drawQueue() {
    while (this.queue.length) {
      let shown = this.queue.shift();
      while (this.queue.length && Date.now() - 1000 * shown.time > PATIENCE_MS) shown = this.queue.shift();
      this.snapshot(shown);
      this.showNumbers();
      await new Promise(requestAnimationFrame);
      this.delays.push(Date.now() - 1000 * shown.time);
    }
    this.drawing = null;
  }

  snapshot(shown) {
    this.last = shown;
    this.cells.length = shown.token_offset + shown.tokens.length;
    shown.tokens.forEach((text, i) => { this.cells[shown.token_offset + i] = { text, sure: shown.confidence[i] }; });
    this.drawCells();
    this.say(`step ${shown.step}${shown.total_steps ? ` of ${shown.total_steps}` : ""}, ${shown.masked} of ${this.cells.length} masked`);
  }

  drawCells() {
    const box = $(".cells", this.root);
    while (box.children.length < this.cells.length) box.append(document.createElement("span"));
    this.cells.forEach((cell, i) => {
      const span = box.children[i];
      const masked = !cell || cell.text === null;
      const looks = masked ? "masked" : `${cell.text} ${cell.sure}`;
      if (span.dataset.looks === looks) return;
      span.dataset.looks = looks;
      span.className = masked ? "cell masked" : "cell";
      span.textContent = masked ? "▒" : SPECIAL.test(cell.text) ? "∎" : cell.text.replaceAll("\n", "⏎") || "·";
      span.style.background = masked || cell.sure === null ? "" : `hsl(${Math.round(130 * cell.sure)} 70% 74%)`;
      span.title = masked ? "masked" : `${JSON.stringify(cell.text)}, confidence ${cell.sure ?? "unknown"}`;
    });
    const masked = this.cells.filter((cell) => !cell || cell.text === null).length;
    box.setAttribute("aria-label", `Canvas: ${this.cells.length - masked} of ${this.cells.length} positions written`);
  }

  async finish() {
    await this.drawing;
    this.seconds = (this.answered - this.began) / 1000;
    this.showNumbers();
    this.say(`done in ${this.seconds.toFixed(2)} s`);
  }

  say(text) { $(".summary", this.root).textContent = text; }

  showNumbers() {
    const report = this.report;
    const pruned = this.pruned;
    const rows = [];
    if (this.last) rows.push(["Step", `${this.last.step}${this.last.total_steps ? ` of ${this.last.total_steps}` : ""}`], ["Masked", this.last.masked]);
    if (pruned) rows.push(["Visual tokens", `${pruned.visual_tokens[0]} → ${pruned.visual_tokens[1]}`], ["KV blocks given back", pruned.kv_blocks_freed]);
    if (report) {
      rows.push(["Denoising steps", report.denoise_steps], ["FLOPs", report.flops.toExponential(2)]);
      const tokens = report.denoise_steps && this.cells.length ? this.cells.filter((cell) => cell && cell.text !== null).length : 0;
      if (this.seconds && tokens) rows.push(["Positions/s", (tokens / this.seconds).toFixed(1)]);
    }
    if (this.delays.length) {
      const sorted = [...this.delays].sort((a, b) => a - b);
      rows.push(["On screen after", `${Math.round(sorted[Math.floor(0.95 * (sorted.length - 1))])} ms`]);
    }
    $(".numbers", this.root).replaceChildren(...rows.map(([name, value]) => {
      const box = document.createElement("div");
      box.append(Object.assign(document.createElement("dt"), { textContent: name }), Object.assign(document.createElement("dd"), { textContent: value }));
      return box;
    }));
  }

  // The picture as the model sees it; patches that were pruned are dimmed.
  drawPicture() {
    const canvas = $(".picture", this.root);
    const image = state.image;
    if (!image) { canvas.width = canvas.height = 0; return; }
    const place = this.pruned?.images?.[0];
    const scale = Math.min(1, 480 / Math.max(image.width, image.height));
    const [width, height] = [Math.max(1, Math.round(image.width * scale)), Math.max(1, Math.round(image.height * scale))];
    // Without a grid of tiles the model sees a square with bars beside the picture.
    const isPadded = place?.overview && !place.grid;
    const side = Math.max(width, height);
    [canvas.width, canvas.height] = isPadded ? [side, side] : [width, height];
    const context = canvas.getContext("2d");
    context.drawImage(image, (canvas.width - width) / 2, (canvas.height - height) / 2, width, height);
    if (!place?.overview) return;
    const kept = new Set(this.pruned.kept);
    const [rows, columns] = place.grid ?? place.overview;
    const first = place.grid ? place.overview[0] * place.overview[1] : 0;
    const stride = columns + (place.grid && place.newlines ? 1 : 0);
    context.fillStyle = "rgba(120, 128, 145, 0.85)"; // seen on dark and on bright pictures
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        if (kept.has(first + row * stride + column)) continue;
        const [x, y] = [Math.floor(column * canvas.width / columns), Math.floor(row * canvas.height / rows)];
        context.fillRect(x, y, Math.floor((column + 1) * canvas.width / columns) - x, Math.floor((row + 1) * canvas.height / rows) - y);
      }
    }
    const seen = place.grid ? "the tiles" : "the picture";
    canvas.setAttribute("aria-label", `The picture; ${this.pruned.visual_tokens[1]} of ${this.pruned.visual_tokens[0]} visual tokens stay, dropped patches of ${seen} are dimmed`);
  }
}

function remember() {
  const saved = { question: $("#question").value, compare: $("#compare").checked, panes: state.panes.map((pane) => ({ recipe: pane.recipe, values: pane.values })) };
  $("#link").href = `#${encodeURIComponent(JSON.stringify(saved))}`;
  state.panes.forEach((pane) => pane.showRequest());
}

function restore() {
  if (location.hash.length < 2) return;
  let saved;
  try { saved = JSON.parse(decodeURIComponent(location.hash.slice(1))); } catch { return; }
  $("#question").value = String(saved.question ?? "");
  $("#compare").checked = Boolean(saved.compare);
  (saved.panes ?? []).slice(0, 2).forEach((each, i) => {
    const pane = state.panes[i];
    for (const [name, value] of Object.entries(each?.values ?? {})) {
      if (name in pane.values && typeof value === typeof pane.values[name]) pane.values[name] = value;
    }
    pane.recipe = RECIPES[each?.recipe] ? each.recipe : "own";
    pane.showSettings();
  });
  showPanes();
}

function showPanes() {
  state.panes[1].root.hidden = !$("#compare").checked;
  remember();
}

async function take(file) {
  if (!file || !file.type.startsWith("image/")) return;
  state.picture = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
  state.image = await createImageBitmap(file);
  for (const pane of state.panes) { pane.pruned = null; pane.drawPicture(); pane.showRequest(); }
}

async function ask(event) {
  event.preventDefault();
  const stop = new AbortController();
  const [send, end] = [$("#send"), $("#stop")];
  send.disabled = true;
  end.disabled = false;
  end.onclick = () => stop.abort();
  const shown = state.panes.filter((pane) => !pane.root.hidden);
  await Promise.all(shown.map((pane) => pane.ask(stop.signal)));
  send.disabled = false;
  end.disabled = true;
}

async function start() {
  try {
    state.about = await (await fetch("dvlm/about")).json();
  } catch (error) {
    $("#about").textContent = `The server does not answer: ${error.message}`;
    return;
  }
  $("#about").textContent = `${state.about.model} (${state.about.family})`;
  state.panes = [new Pane(0), new Pane(1)];
  $("#panes").append(...state.panes.map((pane) => pane.root));
  restore();
  showPanes();
  $("#ask").addEventListener("submit", ask);
  $("#question").addEventListener("input", remember);
  $("#compare").addEventListener("change", showPanes);
  $("#picture").addEventListener("change", (event) => take(event.target.files[0]));
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      document.body.classList.toggle("over", name === "dragover");
      if (name === "drop") take(event.dataTransfer.files[0]);
    });
  }
  document.body.dataset.ready = "yes";
}

start();
