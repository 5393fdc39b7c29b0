// The page: upload, wait, mix. `mixer` is exported for who wants to look at its Web Audio graph.

const $ = (id) => document.getElementById(id);
const COLOURS = ["--c0", "--c1", "--c2", "--c3", "--c4", "--c5"];
const LONG_S = 180; // longer sounds are decoded at half the rate, to halve their memory
const SMOOTH_S = 0.02; // gains move this slowly, so that they don't click
const REST = "_rest";
const titled = (name) => (name === REST ? "the rest" : name.replaceAll("_", " "));
const sure = (p) => (p > 0.99 ? "over 99 % sure" : `${Math.round(p * 100)} % sure`);
const megabytes = (bytes) => `${Math.round(bytes / 2 ** 20)} MB`;
const clock = (s) => `${Math.floor(s / 60)}:${String(Math.floor(s % 60)).padStart(2, "0")}`;

// ---------------------------------------------------------------------------------------- sound

/** Plays a result's sounds together: source → fader → mix ┐
 *                                   mixture → original ──┴→ master → analyser → out */
class Mixer {
  constructor(sampleRate) {
    this.context = new AudioContext({ sampleRate, latencyHint: "playback" });
    this.master = this.context.createGain();
    this.analyser = this.context.createAnalyser();
    this.master.connect(this.analyser).connect(this.context.destination);
    this.mix = this.context.createGain();
    this.original = this.context.createGain();
    this.original.gain.value = 0;
    this.mix.connect(this.master);
    this.original.connect(this.master);
    this.tracks = [];
    this.sources = [];
    this.playing = false;
    this.offset = 0;
    this.duration = 0;
  }

  add(name, buffer, original = false) {
    const gain = this.context.createGain();
    gain.connect(original ? this.original : this.mix);
    const track = { name, buffer, gain, level: 1, muted: false, solo: false, original };
    this.tracks.push(track);
    this.duration = Math.max(this.duration, buffer.duration);
    return track;
  }

  get position() {
    if (!this.playing) return this.offset;
    return Math.min(this.duration, Math.max(0, this.offset + this.context.currentTime - this.startedAt));
  }

  async play() {
    await this.context.resume();
    if (this.playing) return;
    this.stopAlone();
    if (this.offset >= this.duration - 0.01) this.offset = 0;
    this.startedAt = this.context.currentTime + 0.05;
    this.sources = this.tracks.map((track) => {
      const source = this.context.createBufferSource();
      source.buffer = track.buffer;
      source.connect(track.gain);
      source.start(this.startedAt, this.offset); // all at one instant: they stay together to the sample
      return source;
    });
    this.playing = true;
  }

  pause() {
    const at = this.position;
    this.sources.forEach((source) => { source.stop(); source.disconnect(); });
    this.sources = [];
    this.playing = false;
    this.offset = at;
  }

  async seek(seconds) {
    const was = this.playing;
    if (was) this.pause();
    this.offset = Math.min(Math.max(0, seconds), this.duration);
    if (was) await this.play();
  }

  /** Set every gain from levels, mutes and solos. */
  apply() {
    const solo = this.tracks.some((t) => t.solo);
    for (const track of this.tracks) {
      track.audible = track.original || (!track.muted && (!solo || track.solo));
      this.glide(track.gain.gain, track.audible ? track.level : 0);
    }
  }

  listenTo(original) {
    this.glide(this.original.gain, original ? 1 : 0);
    this.glide(this.mix.gain, original ? 0 : 1);
  }

  glide(parameter, value) {
    parameter.setTargetAtTime(value, this.context.currentTime, SMOOTH_S / 3);
  }

  /** Play one buffer by itself. */
  async playAlone(buffer, ended) {
    this.pause();
    this.stopAlone();
    await this.context.resume();
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.master);
    source.onended = () => { if (this.alone === source) { this.alone = null; ended(); } };
    source.start();
    this.alone = source;
    this.aloneEnded = ended;
  }

  stopAlone() {
    if (!this.alone) return;
    this.alone.onended = null;
    this.alone.stop();
    this.alone = null;
    this.aloneEnded();
  }

  close() {
    this.pause();
    this.stopAlone();
    this.context.close();
  }
}

export let mixer = null;

// ------------------------------------------------------------------------------------- requests

class Refused extends Error {
  constructor(status, detail, retry) {
    super(detail);
    this.status = status;
    this.retry = retry;
  }
}

const authorization = () => (sessionStorage.token ? { Authorization: `Bearer ${sessionStorage.token}` } : {});

async function ask(url, options = {}) {
  const answer = await fetch(url.replace(/^\//, ""), { ...options, headers: { ...authorization(), ...options.headers } });
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  throw new Refused(answer.status, body.detail ?? `the server answers ${answer.status}`, +answer.headers.get("Retry-After"));
}

/** POST a form and tell how much has been sent, which fetch can't. */
function upload(form, progress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", "v1/separations");
    request.setRequestHeader("Prefer", "respond-async");
    for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
    request.upload.onprogress = (e) => progress(e.loaded / e.total);
    request.onload = () => {
      const body = JSON.parse(request.responseText || "{}");
      if (request.status < 300) resolve(body);
      else reject(new Refused(request.status, body.detail ?? `the server answers ${request.status}`, +request.getResponseHeader("Retry-After")));
    };
    request.onerror = () => reject(new Error("the server can’t be reached, or closed the connection"));
    request.onabort = () => reject(new DOMException("cancelled", "AbortError"));
    signal.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}

const pause = (seconds, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, seconds * 1000);
  signal?.addEventListener("abort", () => { clearTimeout(timer); reject(new DOMException("cancelled", "AbortError")); });
});

// ----------------------------------------------------------------------------------------- flow

let limits = {};
let local = null; // object URL of the video that was chosen
let working = null; // AbortController of the work in progress
let job = null;

function show(part) {
  for (const id of ["choose", "work", "result"]) $(id).hidden = id !== part;
}

function complain(error) {
  $("alert").textContent = error instanceof Error ? error.message : error;
  $("alert").hidden = false;
  $("token-form").hidden = error.status !== 401;
  if (error.status === 401) $("token").focus();
}

function stage(text, done) {
  if ($("stage").textContent !== text) $("stage").textContent = text;
  if (done === undefined) $("progress").removeAttribute("value");
  else $("progress").value = done;
}

function forget() {
  mixer?.close();
  mixer = null;
  $("video").removeAttribute("src");
  if (local) URL.revokeObjectURL(local);
  local = null;
  job = null;
}

async function separate(file) {
  forget();
  $("alert").hidden = true;
  if (file.size > limits.max_upload_bytes) {
    complain(`${file.name} has ${megabytes(file.size)}; this server takes up to ${megabytes(limits.max_upload_bytes)}.`);
    return;
  }
  local = URL.createObjectURL(file);
  working = new AbortController();
  const { signal } = working;
  show("work");
  let id = null;
  try {
    const form = new FormData();
    const names = [...$("objects").querySelectorAll(":checked")].map((box) => box.value);
    if (names.length) form.append("objects", names.join(","));
    if ($("bases").value) form.append("bases", $("bases").value);
    form.append("file", file);
    stage("Uploading", 0);
    for (let attempt = 1; ; attempt++) {
      try {
        job = await upload(form, (done) => stage("Uploading", done * 0.2), signal);
        break;
      } catch (error) {
        if (error.status !== 503 || attempt === 8) throw error;
        stage("The server is busy; waiting for it");
        await pause((error.retry || 2) * attempt, signal);
      }
    }
    id = job.id;
    const words = { fetching: "Fetching", decoding: "Reading the file", looking: "Looking at the pictures",
      listening: "Listening", separating: "Separating" };
    while (job.status !== "done") {
      if (job.status === "failed") throw new Refused(job.error.status, job.error.detail);
      stage(words[job.stage] ?? "Waiting for its turn", 0.2 + 0.7 * job.progress);
      await pause(0.4, signal);
      job = await (await ask(`v1/separations/${id}`, { signal })).json();
    }
    await present(signal);
  } catch (error) {
    if (id) ask(`v1/separations/${id}`, { method: "DELETE" }).catch(() => {});
    forget();
    show("choose");
    $("file").value = "";
    if (error.name !== "AbortError") complain(error);
  } finally {
    working = null;
  }
}

/** Fetch a finished job's sounds and fill the mixer. */
async function present(signal) {
  const { result } = job;
  const rate = result.duration_s > LONG_S ? result.sample_rate / 2 : result.sample_rate;
  mixer = new Mixer(rate);
  const parts = [...result.objects.map((o) => ({ ...o, title: titled(o.name) })), { name: REST, title: "the rest", audio: result.rest }];
  let fetched = 0;
  const load = async (audio) => {
    const bytes = await (await ask(audio.flac, { signal })).arrayBuffer();
    const buffer = await mixer.context.decodeAudioData(bytes);
    stage("Fetching the sounds", 0.9 + 0.1 * (++fetched / (parts.length + 1)));
    return buffer;
  };
  stage("Fetching the sounds", 0.9);
  const [whole, ...buffers] = await Promise.all([result.mixture, ...parts.map((p) => p.audio)].map(load));
  mixer.add("_mixture", whole, true);
  $("tracks").replaceChildren();
  show("result");
  parts.forEach((part, i) => addTrack(part, mixer.add(part.name, buffers[i]), i));
  mixer.apply();
  $("source").querySelector("[value=mix]").checked = true;
  const heard = result.objects.filter((o) => !o.silent).length;
  const how = { given: "as you said", pictures: "found by picture and sound", sound: "found by sound alone" }[result.objects_from];
  $("summary").textContent = `${heard} ${heard === 1 ? "object" : "objects"}, ${how}. Faders at 0 dB add up to the original.`;
  $("video").hidden = !local;
  $("still").hidden = $("no-picture").hidden = true;
  if (local) $("video").src = local;
  else await still();
  $("seek").max = mixer.duration;
  link($("zip"), result.archive, `separation-${job.id.slice(0, 8)}.zip`);
  link($("png"), result.relation.png, "relation_map.png");
  $("expires").textContent = `The server keeps this result until ${new Date(job.expires).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })}.`;
  history.replaceState(null, "", `#${job.id}`);
  $("result-title").focus();
  requestAnimationFrame(tick);
  await drawAll();
  await showMap();
}

async function still() {
  $("video").hidden = true;
  $("still").hidden = !job.result.frame;
  $("no-picture").hidden = Boolean(job.result.frame);
  if (job.result.frame) $("still").src = await picture(job.result.frame);
}

const picture = async (url) => URL.createObjectURL(await (await ask(url)).blob());

/** Make a download: a plain link, or where a token is needed one that fetches. */
function link(anchor, url, name) {
  anchor.href = url.replace(/^\//, "");
  anchor.download = name;
  anchor.onclick = !sessionStorage.token ? null : async (event) => {
    event.preventDefault();
    const blob = URL.createObjectURL(await (await ask(url)).blob());
    Object.assign(document.createElement("a"), { href: blob, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(blob), 60000);
  };
}

// ---------------------------------------------------------------------------------------- mixer

function addTrack(part, track, number) {
  const row = $("track").content.cloneNode(true).firstElementChild;
  const find = (selector) => row.querySelector(selector);
  row.style.setProperty("--colour", `var(${part.name === REST ? "--rest" : COLOURS[number % COLOURS.length]})`);
  find("h3").textContent = part.title;
  find(".head p").textContent = part.name === REST ? "what belongs to none" : [
    part.silent ? (part.visible ? "visible, but silent" : "silent") : `${Math.round(part.sound_score * 100)} % of the sound`,
    part.found === "sound" && part.visible === false && !part.silent && "not seen",
    part.found !== "given" && sure(part.silent ? 1 - part.confidence : part.confidence),
  ].filter(Boolean).join(", ");
  find(".fader .hidden").textContent = `Level of ${part.title}`;
  const fader = find(".fader input");
  fader.oninput = () => {
    const decibels = +fader.value;
    track.level = decibels <= +fader.min ? 0 : 10 ** (decibels / 20);
    const text = track.level === 0 ? "off" : `${decibels > 0 ? "+" : ""}${decibels} dB`.replace("-", "−");
    find(".fader output").textContent = text;
    fader.setAttribute("aria-valuetext", text);
    refresh();
  };
  fader.ondblclick = () => { fader.value = 0; fader.oninput(); };
  fader.setAttribute("aria-valuetext", "0 dB");
  for (const [selector, field, verb] of [[".mute", "muted", "Mute"], [".solo", "solo", "Solo"]]) {
    const button = find(selector);
    button.setAttribute("aria-label", `${verb} ${part.title}`);
    button.onclick = () => {
      track[field] = !track[field];
      button.setAttribute("aria-pressed", track[field]);
      refresh();
    };
  }
  link(find(".wav"), part.audio.wav, `${part.name}.wav`);
  link(find(".flac"), part.audio.flac, `${part.name}.flac`);
  for (const kind of ["wav", "flac"]) find(`.${kind}`).setAttribute("aria-label", `Download ${part.title} as ${kind.toUpperCase()}`);
  find(".views").onclick = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    seek(((event.clientX - box.left) / box.width) * mixer.duration);
  };
  track.row = row;
  $("tracks").append(row);
}

function refresh() {
  mixer.apply();
  for (const track of mixer.tracks) track.row?.classList.toggle("off", !track.audible);
}

async function toggle() {
  if (mixer.playing) mixer.pause();
  else await mixer.play();
  followVideo(true);
}

async function seek(seconds) {
  await mixer.seek(seconds);
  followVideo(true);
}

/** Keep the picture with the sound, which is the clock. */
function followVideo(jumped) {
  const video = $("video");
  if (video.hidden || !video.src || video.error) return;
  const at = Math.min(mixer.position, video.duration || Infinity);
  if (jumped || Math.abs(video.currentTime - at) > 0.12) video.currentTime = at;
  const should = mixer.playing && at < (video.duration || Infinity);
  if (should && video.paused) video.play().catch(() => {});
  if (!should && !video.paused) video.pause();
}

let lastFollow = 0;
function tick(now) {
  if (!mixer) return;
  const at = mixer.position;
  if (mixer.playing && at >= mixer.duration) mixer.pause();
  const seekBar = $("seek");
  if (!seekBar.matches(":active")) seekBar.value = at;
  const text = `${clock(at)} / ${clock(mixer.duration)}`;
  if ($("time").value !== text) {
    $("time").value = text;
    seekBar.setAttribute("aria-valuetext", `${clock(at)} of ${clock(mixer.duration)}`);
  }
  const label = mixer.playing ? "Pause" : "Play";
  if ($("play").textContent !== label) $("play").textContent = label;
  for (const track of mixer.tracks)
    if (track.row) track.row.querySelector(".playhead").style.left = `${(100 * at) / mixer.duration}%`;
  if (now - lastFollow > 500) {
    lastFollow = now;
    followVideo(false);
  }
  requestAnimationFrame(tick);
}

// ------------------------------------------------------------------------------------- drawings

async function drawAll() {
  const drawn = mixer;
  const top = Math.max(...drawn.tracks.map((t) => t.buffer.getChannelData(0).reduce((m, x) => Math.max(m, Math.abs(x)), 0)), 1e-4);
  const reference = drawn.tracks[0];
  const loudest = await spectrogram(reference.buffer, null, 0);
  for (const track of drawn.tracks) {
    if (!track.row || drawn !== mixer) continue;
    drawWave(track.row.querySelector(".wave"), track.buffer, top);
    await spectrogram(track.buffer, track.row.querySelector(".spectrogram"), loudest);
  }
}

const colourOf = (element, name) => getComputedStyle(element).getPropertyValue(name).trim();

function sized(canvas) {
  const ratio = Math.min(2, window.devicePixelRatio || 1);
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio));
  return canvas.getContext("2d");
}

function drawWave(canvas, buffer, top) {
  const pen = sized(canvas);
  const { width, height } = canvas;
  const samples = buffer.getChannelData(0);
  pen.fillStyle = colourOf(canvas, "color");
  pen.fillStyle = getComputedStyle(canvas.closest(".track").querySelector("h3")).color;
  const length = mixer.duration * buffer.sampleRate;
  for (let x = 0; x < width; x++) {
    let low = 0, high = 0;
    const end = Math.min(samples.length, ((x + 1) * length) / width);
    for (let i = Math.floor((x * length) / width); i < end; i++) {
      if (samples[i] < low) low = samples[i];
      else if (samples[i] > high) high = samples[i];
    }
    const y = (v) => (height / 2) * (1 - v / top);
    pen.fillRect(x, y(high), 1, Math.max(1, y(low) - y(high)));
  }
}

/** In-place radix-2 FFT. */
function fft(re, im) {
  const n = re.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) { [re[i], re[j]] = [re[j], re[i]]; [im[i], im[j]] = [im[j], im[i]]; }
  }
  for (let size = 2; size <= n; size <<= 1) {
    const half = size >> 1, angle = (-2 * Math.PI) / size;
    for (let k = 0; k < half; k++) {
      const c = Math.cos(angle * k), s = Math.sin(angle * k);
      for (let i = k; i < n; i += size) {
        const a = re[i + half] * c - im[i + half] * s, b = re[i + half] * s + im[i + half] * c;
        re[i + half] = re[i] - a; im[i + half] = im[i] - b;
        re[i] += a; im[i] += b;
      }
    }
  }
}

/** Draw a spectrogram, 60 dB deep, on a scale of frequency that ears like; without a canvas, only say the loudest dB. */
async function spectrogram(buffer, canvas, loudest) {
  const n = 2048, rows = 64, top = 12000, bottom = 60;
  const samples = buffer.getChannelData(0);
  const pen = canvas && sized(canvas);
  const width = canvas ? Math.min(canvas.width, 900) : 100;
  const window_ = Float32Array.from({ length: n }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / n));
  const mel = (hz) => Math.log10(1 + hz / 700);
  const edge = (r) => (700 * (10 ** (mel(bottom) + (r / rows) * (mel(top) - mel(bottom))) - 1) * n) / buffer.sampleRate;
  const image = pen && new ImageData(width, rows);
  const ink = canvas ? pixel(getComputedStyle(canvas.closest(".track").querySelector("h3")).color) : [0, 0, 0];
  const re = new Float32Array(n), im = new Float32Array(n);
  let most = -200, rested = performance.now();
  for (let x = 0; x < width; x++) {
    const start = Math.round(((x + 0.5) / width) * mixer.duration * buffer.sampleRate - n / 2);
    for (let i = 0; i < n; i++) re[i] = (samples[start + i] ?? 0) * window_[i];
    im.fill(0);
    fft(re, im);
    for (let r = 0; r < rows; r++) {
      const from = Math.floor(edge(r)), to = Math.max(from + 1, Math.ceil(edge(r + 1)));
      let power = 0;
      for (let k = from; k < to; k++) power = Math.max(power, re[k] * re[k] + im[k] * im[k]);
      const level = 10 * Math.log10(power + 1e-12);
      most = Math.max(most, level);
      if (image) image.data.set([...ink, 255 * Math.min(1, Math.max(0, 1 + (level - loudest) / 60)) ** 1.3], 4 * ((rows - 1 - r) * width + x));
    }
    if (performance.now() - rested > 12) { // let the page breathe
      await new Promise((resolve) => setTimeout(resolve));
      rested = performance.now();
      if (!mixer) return most;
    }
  }
  if (image) {
    const bitmap = await createImageBitmap(image);
    pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  }
  return most;
}

function pixel(colour) {
  const pen = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
  pen.fillStyle = colour;
  pen.fillRect(0, 0, 1, 1);
  return [...pen.getImageData(0, 0, 1, 1).data.slice(0, 3)];
}

let resized = null;
addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(() => mixer && drawAll(), 250); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => mixer && drawAll());

// --------------------------------------------------------------------------------- relation map

let map = null;
async function showMap() {
  map = await (await ask(job.result.relation.data)).json();
  $("map-seconds").textContent = Math.round(map.duration_s);
  $("map-frame").hidden = !job.result.frame;
  if (job.result.frame) $("map-frame").src = await picture(job.result.frame);
  drawMap();
}

function drawMap() {
  const all = $("all-rows").checked;
  const rows = map.objects.map((name, i) => ({ name, cells: map.posteriors[i] }))
    .filter(({ name, cells }) => all || map.audible.includes(name) || Math.max(...cells) >= 0.25);
  const grid = document.createElement("tbody");
  const top = Math.max(...map.energy);
  const bars = grid.insertRow();
  bars.className = "energy";
  bars.setAttribute("aria-hidden", "true");
  bars.append(Object.assign(document.createElement("th"), { textContent: "loudness" }));
  for (const energy of map.energy) {
    const bar = document.createElement("i");
    bar.style.height = `${Math.max(1, 24 * Math.sqrt(energy / top))}px`;
    bars.insertCell().append(bar);
  }
  for (const { name, cells } of rows) {
    const row = grid.insertRow();
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = titled(name);
    head.className = map.audible.includes(name) ? "audible" : "";
    row.append(head);
    cells.forEach((p, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.tabIndex = -1;
      button.style.setProperty("--p", p);
      button.setAttribute("aria-label", `Basis ${column + 1}, ${titled(name)}: ${Math.round(100 * p)} %. Play it`);
      button.title = `basis ${column + 1}, ${titled(name)}: ${Math.round(100 * p)} %`;
      button.onclick = () => playBasis(column);
      row.insertCell().append(button);
    });
  }
  grid.querySelector("button").tabIndex = 0;
  $("grid").replaceChildren(grid);
}

/** One cell of the grid is in the tab order; arrows move on from it. */
$("grid").addEventListener("keydown", (event) => {
  const cell = event.target.closest("td");
  if (!cell) return;
  const { row, column } = { row: cell.parentElement, column: cell.cellIndex };
  const target = {
    ArrowLeft: cell.previousElementSibling, ArrowRight: cell.nextElementSibling,
    ArrowUp: row.previousElementSibling?.cells[column], ArrowDown: row.nextElementSibling?.cells[column],
    Home: row.cells[1], End: row.cells[row.cells.length - 1],
  }[event.key]?.querySelector?.("button");
  if (!target) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  target.tabIndex = 0;
  target.focus();
});

let basisPlaying = null;
async function playBasis(column) {
  const again = basisPlaying === column;
  mixer.stopAlone();
  if (again) return;
  try {
    const basis = map.basis[column];
    const bytes = await (await ask(`v1/separations/${job.id}/bases/${basis}.wav`)).arrayBuffer();
    const buffer = await mixer.context.decodeAudioData(bytes);
    await mixer.playAlone(buffer, () => mark(null));
    followVideo(true);
    mark(column);
  } catch (error) {
    complain(error);
  }
}

function mark(column) {
  basisPlaying = column;
  for (const row of $("grid").rows) [...row.cells].forEach((cell, i) => cell.classList.toggle("playing", i - 1 === column));
  if (column === null) { $("basis-line").textContent = ""; return; }
  const best = map.objects.map((name, i) => [map.posteriors[i][column], name]).sort((a, b) => b[0] - a[0]).slice(0, 3);
  $("basis-line").textContent = `Playing basis ${column + 1}, ${Math.round(100 * map.energy[column])} % of the energy: `
    + best.map(([p, name]) => `${titled(name)} ${Math.round(100 * p)} %`).join(", ");
}

// --------------------------------------------------------------------------------------- wiring

$("file").onchange = () => { if ($("file").files[0]) separate($("file").files[0]); };
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0] && !working) separate(event.dataTransfer.files[0]);
  });
}
$("cancel").onclick = () => working?.abort();
$("play").onclick = toggle;
$("seek").oninput = () => seek(+$("seek").value);
$("source").onchange = () => mixer.listenTo($("source").querySelector(":checked").value === "original");
$("all-rows").onchange = drawMap;
$("video").onerror = () => { if (mixer && $("video").src) still(); };
$("video").onloadedmetadata = () => { if (!$("video").videoWidth) still(); };
$("again").onclick = () => { forget(); history.replaceState(null, "", location.pathname); $("file").value = ""; show("choose"); $("file").focus(); };
$("delete").onclick = async () => {
  await ask(`v1/separations/${job.id}`, { method: "DELETE" }).catch(complain);
  $("again").click();
};
document.addEventListener("keydown", (event) => {
  if (event.key === " " && mixer && !event.target.closest("button, input, a, select, summary")) {
    event.preventDefault();
    toggle();
  }
});
$("token-form").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.token = $("token").value;
  location.reload();
};

async function begin() {
  const objects = await (await ask("v1/objects")).json();
  $("objects").replaceChildren(...objects.map(({ name }) => {
    const label = document.createElement("label");
    label.append(Object.assign(document.createElement("input"), { type: "checkbox", value: name }), titled(name));
    return label;
  }));
  const model = await (await ask("v1/model")).json();
  limits = model.limits;
  $("limits").textContent = `Up to ${Math.round(limits.max_duration_s / 60)} minutes and ${megabytes(limits.max_upload_bytes)}. `
    + `It stays on this server, and its sounds are deleted after ${Math.round(limits.results_ttl_s / 60)} minutes.`;
  if (!model.dictionary) for (const option of $("bases").options) option.disabled = ["learned", "both"].includes(option.value);
  const id = location.hash.slice(1);
  if (id) {
    try {
      job = await (await ask(`v1/separations/${id}`)).json();
      if (job.status === "done") { show("work"); await present(); }
    } catch (error) {
      forget();
      show("choose");
      complain(error.status === 404 ? "That result is no longer there." : error);
    }
  }
  const examples = await (await ask("v1/examples")).json();
  $("examples").replaceChildren(...examples.map(({ name, url }) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: name.replaceAll("-", " ") });
    button.onclick = async () => {
      try {
        separate(new File([await (await ask(url)).blob()], name));
      } catch (error) {
        complain(error);
      }
    };
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
  $("examples-box").hidden = !examples.length;
}
begin().catch(complain);
