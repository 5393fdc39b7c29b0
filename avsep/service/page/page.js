// The page: choose, upload, wait, mix. `mixer` is exported for who wants to look at its Web Audio graph.

import { Editing } from "./edit.js";
import { showPlaces, syncPlaces, updatePlaces } from "./locate.js";
import { addOptions, offerMix, offerStems } from "./mix.js";

const $ = (id) => document.getElementById(id);
const COLOURS = ["--c0", "--c1", "--c2", "--c3", "--c4", "--c5"];
const MOST_BYTES = 400 * 2 ** 20; // of decoded sounds; those of more are decoded at half the rate, or a quarter
const SMOOTH_S = 0.02; // gains move this slowly, so that they don't click
const JUMP_S = 5; // of the arrow keys
const REST = "_rest";
const titled = (name) => (name === REST ? "the rest" : name.replaceAll("_", " "));
const sure = (p) => (p > 0.99 ? "over 99 % sure" : `${Math.round(p * 100)} % sure`);
const megabytes = (bytes) => (bytes < 10 * 2 ** 20 ? +(bytes / 2 ** 20).toFixed(1) : Math.round(bytes / 2 ** 20));
const roundMegabytes = (bytes) => `${Math.max(1, Math.round(bytes / 2 ** 20))} MB`;
const clock = (s) => `${Math.floor(s / 60)}:${String(Math.floor(s % 60)).padStart(2, "0")}`;
const lasting = (s) => (s < 120 ? `${Math.round(s)} seconds` : `${+(s / 60).toFixed(1)} minutes`);
const sentence = (text) => (text ? text[0].toUpperCase() + text.slice(1).replace(/([^.!?])$/, "$1.") : "");

// ---------------------------------------------------------------------------------------- sound

/** Plays a result's sounds together: source → fader → master → analyser → out. The original is all of them, full. */
class Mixer {
  constructor(sampleRate) {
    this.context = new AudioContext({ sampleRate, latencyHint: "playback" });
    this.master = this.context.createGain();
    this.analyser = this.context.createAnalyser();
    this.master.connect(this.analyser).connect(this.context.destination);
    this.tracks = [];
    this.sources = [];
    this.playing = false;
    this.original = false;
    this.offset = 0;
    this.duration = 0;
  }

  add(name, buffer) {
    const gain = this.context.createGain();
    gain.connect(this.master);
    const track = { name, buffer, gain, level: 1, muted: false, solo: false };
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
    if (this.playing || this.closed) return;
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
      track.audible = !track.muted && (!solo || track.solo);
      const level = this.original ? 1 : track.audible ? track.level : 0;
      track.gain.gain.setTargetAtTime(level, this.context.currentTime, SMOOTH_S / 3);
    }
  }

  listenTo(original) {
    this.original = original;
    this.apply();
  }

  /** Play one buffer by itself. */
  async playAlone(buffer, ended) {
    this.pause();
    this.stopAlone();
    await this.context.resume();
    if (this.closed) return;
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
    this.closed = true;
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

const UNREACHABLE = "the server can’t be reached, or closed the connection";
const authorization = () => (sessionStorage.token ? { Authorization: `Bearer ${sessionStorage.token}` } : {});

async function ask(url, options = {}) {
  let answer;
  try {
    answer = await fetch(url.replace(/^\//, ""), { ...options, headers: { ...authorization(), ...options.headers } });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refused(0, UNREACHABLE);
  }
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
    request.upload.onprogress = (e) => progress(e.loaded, e.total);
    request.onload = () => {
      let body = {};
      try { body = JSON.parse(request.responseText); } catch { /* a proxy's words */ }
      if (request.status < 300) resolve(body);
      else reject(new Refused(request.status, body.detail ?? `the server answers ${request.status}`, +request.getResponseHeader("Retry-After")));
    };
    request.onerror = () => reject(new Refused(0, UNREACHABLE));
    request.onabort = () => reject(new DOMException("left", "AbortError"));
    signal.addEventListener("abort", () => request.abort());
    if (signal.aborted) reject(new DOMException("left", "AbortError"));
    else request.send(form);
  });
}

const pause = (seconds, signal) => new Promise((resolve, reject) => {
  const left = () => { clearTimeout(timer); reject(signal.reason); };
  const timer = setTimeout(() => { signal.removeEventListener("abort", left); resolve(); }, seconds * 1000);
  signal.addEventListener("abort", left, { once: true });
});

// ---------------------------------------------------------------------------------------- views

/** What the page shows at a time. Whatever is begun for it ends when it is left: nothing of it may touch the next. */
class View {
  constructor(part) {
    this.part = part;
    this.left = new AbortController();
    this.signal = this.left.signal;
    this.urls = [];
  }

  /** Go on after a wait, unless the view was left meanwhile. */
  stay() {
    this.signal.throwIfAborted();
  }

  ask(url) {
    return ask(url, { signal: this.signal });
  }

  url(blob) {
    const url = URL.createObjectURL(blob);
    this.urls.push(url);
    return url;
  }

  leave() {
    this.left.abort(new DOMException("left", "AbortError"));
    this.mixer?.close();
    setTimeout(() => this.urls.forEach(URL.revokeObjectURL), 1000); // what is loading them stops first
  }
}

let view = new View("choose");
const files = new Map(); // by job, what was chosen: its picture is shown without asking for it
let limits = {};
let learned = null; // the objects that the model can tell

function show(part) {
  view.part = part;
  for (const id of ["choose", "work", "result"]) $(id).hidden = id !== part;
}

/** Leave what is shown and begin the next. */
function enter(part) {
  view.leave();
  view = new View(part);
  mixer = null;
  basisPlaying = null;
  if ($("video").src) { $("video").removeAttribute("src"); $("video").load(); }
  $("alert").hidden = $("notice").hidden = $("stay").hidden = true;
  $("file").value = "";
  document.title = "avsep: hear a video’s objects";
  $("edit-line").textContent = "";
  show(part);
  return view;
}

/** Do a view's work; what goes wrong leads to the start page, which says so. */
async function within(here, work) {
  try {
    await work();
  } catch (error) {
    if (here !== view || error.name === "AbortError") return;
    if (error.status !== 401) history.replaceState(null, "", location.pathname + location.search);
    enter("choose");
    complain(error, here.name);
  }
}

function complain(error, name = "") {
  const text = error.status === 401 ? "this service asks for its token" : error instanceof Error ? error.message : error;
  $("alert").textContent = name ? `${name}: ${text.replace(/([^.!?])$/, "$1.")}` : sentence(text);
  $("alert").hidden = false;
  $("token-form").hidden = error.status !== 401;
  if (error.status === 401) $("token").focus();
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function stage(text, done) {
  if ($("stage").textContent !== text) $("stage").textContent = text;
  if (done === undefined) $("progress").removeAttribute("value");
  else $("progress").value = done;
}

/** Show what the address says: a job, or the start page. */
function route() {
  const id = location.hash.slice(1);
  const here = enter(id ? "work" : "choose");
  if (id) within(here, () => follow(here, id, history.state?.name));
}

function start(how) {
  history[how](null, "", location.pathname + location.search);
  enter("choose");
}

// ----------------------------------------------------------------------------------------- work

/** Separate a file, or what a function fetches. */
async function separate(source, said = "") {
  if (location.hash) history.pushState(null, "", location.pathname + location.search); // the result stays behind it
  const here = enter("work");
  here.fresh = true;
  notice(said);
  await within(here, async () => {
    stage("Looking at the file");
    const file = typeof source === "function" ? await source(here.signal) : source;
    here.stay();
    named(here, file.name);
    await check(here, file);
    const form = new FormData();
    const names = [...$("objects").querySelectorAll(":checked")].map((box) => box.value);
    if (names.length) form.append("objects", names.join(","));
    addOptions(form);
    form.append("file", file);
    const { id } = await send(here, form);
    here.stay();
    files.set(id, file);
    history.pushState({ name: file.name }, "", `#${id}`);
    await follow(here, id, file.name);
  });
}

function named(here, name) {
  here.name = name;
  $("work-title").textContent = name ?? "Working";
  if (name) document.title = `${name} – avsep`;
}

/** Say before anything is sent what would be refused afterwards. */
async function check(here, file) {
  if (/^(text|image|font)\/|^application\/(json|pdf|zip|xml|msword|vnd)/.test(file.type)) {
    throw new Error("this is neither a video nor a sound; MP4, MOV, WebM, MP3, WAV and most others can be read");
  }
  const [model, health] = await Promise.all(["v1/model", "healthz"].map(async (url) => (await here.ask(url)).json()));
  limits = model.limits;
  if (!file.size) throw new Error("the file is empty, or a folder");
  if (file.size > limits.max_upload_bytes) {
    throw new Error(`it has more than ${roundMegabytes(limits.max_upload_bytes)}, the most that this server takes; send a smaller version, or its sound alone`);
  }
  if (file.size > limits.free_bytes) throw new Error("the server has no room for it now; try again later");
  const seconds = await duration(here, file);
  if (seconds > limits.max_duration_s) {
    throw new Error(`it lasts ${lasting(seconds)}; this server takes up to ${lasting(limits.max_duration_s)}. `
      + "Send a part of it, or use the command “avsep separate”, which takes any length");
  }
  for (let attempt = 1; health.busy; attempt++) {
    stage("The server is busy; waiting for it");
    await pause(Math.min(2 * attempt, 10), here.signal);
    Object.assign(health, await (await here.ask("healthz")).json());
  }
}

/** How many seconds the browser finds in a file; NaN where it doesn't know. */
async function duration(here, file) {
  const probe = document.createElement("video");
  const found = new Promise((resolve) => {
    probe.onloadedmetadata = () => resolve(Number.isFinite(probe.duration) ? probe.duration : NaN);
    probe.onerror = () => resolve(NaN);
  });
  probe.preload = "metadata";
  probe.src = here.url(file);
  try {
    return await Promise.race([found, pause(4, here.signal).then(() => NaN)]);
  } finally {
    probe.removeAttribute("src");
    probe.load();
  }
}

async function send(here, form) {
  const tell = (sent, all) => here === view
    && stage(`Uploading: ${megabytes(sent)} of ${megabytes(all)} MB`, 0.2 * (sent / all));
  for (let attempt = 1; ; attempt++) {
    try {
      stage("Uploading", 0);
      return await upload(form, tell, here.signal);
    } catch (error) {
      if (![429, 503].includes(error.status) || attempt === 8) throw error;
      stage("The server is busy; waiting for it");
      await pause((error.retry || 2) * attempt, here.signal);
    }
  }
}

const STAGES = { fetching: "Fetching", decoding: "Reading the file", looking: "Looking at the pictures",
  listening: "Listening", separating: "Separating" };

/** Wait for a job, however long and through whatever happens to the line, and show its result. */
async function follow(here, id, name) {
  here.id = id;
  named(here, name);
  stage("Looking for it");
  for (let attempt = 1; ; attempt++) {
    let job = null;
    try {
      job = await (await here.ask(`v1/separations/${id}`)).json();
      attempt = 1;
    } catch (error) {
      if (error.status === 404) throw new Error("that result is no longer there");
      if (error.name === "AbortError" || (error.status >= 400 && error.status < 500 && error.status !== 429)) throw error;
      stage("The server can’t be reached; trying again");
    }
    here.stay();
    if (job?.status === "failed") {
      ask(`v1/separations/${id}`, { method: "DELETE" }).catch(() => {});
      throw new Refused(job.error.status, job.error.detail);
    }
    if (job?.status === "done") {
      here.job = job;
      return present(here);
    }
    if (job) {
      stage(STAGES[job.stage] ?? "Waiting for its turn", 0.2 + 0.7 * job.progress);
      $("stay").hidden = false;
    }
    await pause(Math.min(0.4 * attempt, 5), here.signal);
  }
}

/** Leave what is under way; work that isn't done is stopped, what is done stays. */
function cancel() {
  if (view.id && !view.job) ask(`v1/separations/${view.id}`, { method: "DELETE", keepalive: true }).catch(() => {});
  start("replaceState");
}

// --------------------------------------------------------------------------------------- result

/** Fetch a finished job's sounds and fill the mixer. */
async function present(here) {
  const { job, job: { result } } = here;
  const heard = result.objects.filter((o) => !o.silent).sort((a, b) => (b.sound_score ?? 0) - (a.sound_score ?? 0));
  const parts = [...heard.filter((o) => o.audio), { name: REST, audio: result.rest }];
  here.mixer = new Mixer(mixerRate(result, parts.length));
  const buffers = await load(here, parts.map((p) => p.audio));
  mixer = here.mixer;
  $("tracks").replaceChildren();
  show("result");
  parts.forEach((part, i) => addTrack(part, mixer.add(part.name, buffers[i]), i));
  mixer.apply();
  $("source").querySelector("[value=mix]").checked = true;
  summarize(job, heard.length);
  pictureOf(here);
  $("seek").max = mixer.duration;
  offerMix(here, complain);
  link($("zip"), result.archive, `separation-${job.id.slice(0, 8)}.zip`);
  $("map").hidden = $("png").hidden = !result.relation; // a separator without bases has none
  if (result.relation) link($("png"), result.relation.png, "relation_map.png");
  $("result-title").focus();
  requestAnimationFrame(() => tick(here));
  showPlaces(here).catch((error) => here === view && complain(error));
  await drawAll(here).catch((error) => here.stay() ?? complain(error));
  if (result.relation) await showMap(here).catch((error) => here.stay() ?? complain(error));
  await editing.show(here).catch((error) => here.stay() ?? complain(error));
}

/** Fetch the sounds of a result that was corrected; position, levels and mutes stay as they are. */
async function reload(here) {
  const { result } = here.job;
  const before = here.mixer.tracks;
  const place = (o) => (before.findIndex((t) => t.name === o.name) + 1 || 1e3);
  const heard = result.objects.filter((o) => !o.silent).sort((a, b) => place(a) - place(b));
  const parts = [...heard.filter((o) => o.audio), { name: REST, audio: result.rest }];
  const [buffers, map] = await Promise.all([
    load(here, parts.map((p) => p.audio), ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname)),
    here.ask(result.relation.data).then((answer) => answer.json()),
  ]);
  here.stay();
  const { playing, position } = here.mixer;
  here.mixer.pause();
  here.mixer.stopAlone();
  for (const track of before) track.gain.disconnect();
  Object.assign(here.mixer, { tracks: [], duration: 0 });
  $("tracks").replaceChildren();
  parts.forEach((part, i) => {
    addTrack(part, here.mixer.add(part.name, buffers[i]), i);
    const old = before.find((t) => t.name === part.name)?.row;
    const row = $("tracks").lastElementChild;
    if (!old) return;
    row.querySelector(".fader input").value = old.querySelector(".fader input").value;
    row.querySelector(".fader input").oninput();
    for (const kind of [".mute", ".solo"]) if (old.querySelector(kind).ariaPressed === "true") row.querySelector(kind).click();
  });
  refresh();
  here.mixer.offset = Math.min(position, here.mixer.duration);
  if (playing) await here.mixer.play();
  summarize(here.job, heard.length);
  here.map = map;
  updatePlaces(here);
  drawMap();
  drawAll(here).catch(() => {}); // left meanwhile, or drawn again
}

/** The rate that sounds are decoded at: their own, as far as it can be heard and memory holds them. */
function mixerRate({ sample_rate, channels, duration_s }, n) {
  let rate = Math.min(48000, Math.max(8000, sample_rate));
  while (rate >= 16000 && 4 * n * channels * duration_s * rate > MOST_BYTES) rate /= 2;
  return rate;
}

/** Fetch and decode sounds, in a small format where the browser knows it. */
async function load(here, sounds, near = false) {
  const small = document.createElement("audio").canPlayType('audio/ogg; codecs="vorbis"');
  const sizes = sounds.map(() => [0, 0]);
  const tell = () => {
    const [got, all] = [0, 1].map((k) => sizes.reduce((sum, size) => sum + size[k], 0));
    const known = sizes.every(([, size]) => size);
    stage(known ? `Fetching the sounds: ${megabytes(got)} of ${megabytes(all)} MB` : "Fetching the sounds",
      0.9 + (known ? 0.1 * (got / all) : 0));
  };
  const bytes = async (url, i) => {
    const answer = await here.ask(url);
    sizes[i] = [0, +answer.headers.get("Content-Length")];
    const pieces = [];
    for (const reader = answer.body.getReader(); ;) {
      const { done, value } = await reader.read();
      here.stay();
      if (done) return new Blob(pieces).arrayBuffer();
      pieces.push(value);
      sizes[i][0] += value.length;
      tell();
    }
  };
  const decode = async (url, i) => here.mixer.context.decodeAudioData(await bytes(url, i));
  stage("Fetching the sounds", 0.9);
  const buffers = await Promise.all(sounds.map(async ({ ogg, flac, wav }, i) => {
    if (near) return decode(wav, i); // nothing has to be encoded
    if (!small || !ogg) return decode(flac ?? wav, i);
    return decode(ogg, i).catch((error) => {
      if (error instanceof Refused || here.signal.aborted) throw error;
      return decode(flac ?? wav, i); // it promised too much
    });
  }));
  here.stay();
  return buffers;
}

/** Say in words what was found, and what to think of it. */
function summarize(job, n) {
  const { result } = job;
  const how = { given: "as you said", pictures: "found by picture and sound", sound: "found by sound alone" }[result.objects_from];
  $("summary").textContent = `${n || "No"} ${n === 1 ? "object" : "objects"}, ${how}. With every fader at 0 dB you hear the original.`;
  const silent = result.objects.filter((o) => o.silent);
  $("silent").textContent = silent.length
    ? `${silent.some((o) => o.visible) ? "Seen, but not heard" : "Not heard"}: ${silent.map((o) => titled(o.name)
      + (o.found === "given" ? "" : ` (${sure(1 - o.confidence)})`)
      + (doubtOf(o) ? ` – ${doubtOf(o)}` : "")).join(", ")}.` : "";
  $("silent").hidden = !silent.length;
  $("remark").textContent = sentence(result.note.replaceAll("_", " "));
  $("remark").hidden = !result.note;
  $("trained").textContent = training(result.trained_on);
  $("expires").textContent = `The server keeps this result until ${new Date(job.expires).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })}.`;
}

const doubtOf = (part) => part.doubt || (part.learned === false ? "the model never learned its sound: don’t rely on this" : "");

/** Say in a sentence what a model learned from. */
function training(facts) {
  const counts = facts?.clips_by_label;
  if (!counts) return "";
  const clips = facts.clips ? ` from ${facts.clips.toLocaleString("en")} clips` : "";
  const each = Object.entries(counts).map(([name, n]) => `${titled(name)} ${n.toLocaleString("en")}`).join(", ");
  const several = `${Object.keys(counts).length} object${Object.keys(counts).length === 1 ? "" : "s"}`;
  return `The model learned ${several}${clips}${facts.about ? ` (${facts.about})` : ""}, so many of each: ${each}. Of other objects it knows nothing.`;
}

function pictureOf(here) {
  const file = files.get(here.id);
  const video = $("video");
  video.hidden = !file;
  $("still").hidden = $("no-picture").hidden = true;
  const instead = () => here === view && still(here).catch(() => {});
  video.onerror = instead;
  video.onloadedmetadata = () => { if (!video.videoWidth) instead(); };
  if (file) video.src = here.url(file);
  else instead();
}

async function still(here) {
  $("video").hidden = true;
  $("no-picture").hidden = Boolean(here.job.result.frame);
  if (!here.job.result.frame) return;
  $("still").src = await frame(here, "?marked=false");
  $("still").hidden = false;
}

/** The address of the result's picture, with boxes around the objects or without. */
async function frame(here, query) {
  const blob = await (await here.ask(here.job.result.frame + query)).blob();
  here.stay();
  return here.url(blob);
}

/** Make a download: a plain link, or where a token is needed one that fetches. */
function link(anchor, url, name) {
  anchor.href = url.replace(/^\//, "");
  anchor.download = name;
  anchor.onclick = !sessionStorage.token ? null : async (event) => {
    event.preventDefault();
    try {
      const blob = URL.createObjectURL(await (await ask(url)).blob());
      Object.assign(document.createElement("a"), { href: blob, download: name }).click();
      setTimeout(() => URL.revokeObjectURL(blob), 60000);
    } catch (error) {
      complain(error);
    }
  };
}

async function remove() {
  const here = view;
  try {
    await ask(`v1/separations/${here.id}`, { method: "DELETE" });
  } catch (error) {
    if (error.status !== 404) { complain(error); return; }
  }
  files.delete(here.id);
  if (here === view) start("replaceState");
}

// ---------------------------------------------------------------------------------------- mixer

function describe(part) {
  if (part.name === REST) return "everything else";
  const share = view.job.result.edited ? "has" : "claims"; // a sound may hold more than is claimed
  return [
    part.sound_score !== null && `${share} ${Math.round(part.sound_score * 100)} % of the sound`,
    part.visible === true && "seen in the picture",
    part.visible === false && "not seen",
    part.found !== "given" && `${sure(part.confidence)} that it is heard`,
  ].filter(Boolean).join(", ");
}

function addTrack(part, track, number) {
  const row = $("track").content.cloneNode(true).firstElementChild;
  const find = (selector) => row.querySelector(selector);
  const title = titled(part.name);
  row.style.setProperty("--colour", `var(${part.name === REST ? "--rest" : COLOURS[number % COLOURS.length]})`);
  find("h3").textContent = title;
  find("kbd").textContent = number < 9 ? number + 1 : "";
  find(".hint").textContent = describe(part);
  find(".doubt").textContent = sentence(doubtOf(part));
  find(".doubt").hidden = !doubtOf(part);
  find(".fader .hidden").textContent = `Level of ${title}`;
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
    button.setAttribute("aria-label", `${verb} ${title}`);
    button.onclick = () => {
      track[field] = !track[field];
      button.setAttribute("aria-pressed", track[field]);
      refresh();
    };
  }
  for (const kind of ["wav", "flac"]) {
    find(`.${kind}`).hidden = !part.audio[kind];
    if (!part.audio[kind]) continue;
    link(find(`.${kind}`), part.audio[kind], `${part.name}.${kind}`);
    find(`.${kind}`).setAttribute("aria-label", `Download ${title} as ${kind.toUpperCase()}`);
  }
  find(".views").onclick = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    seek(((event.clientX - box.left) / box.width) * mixer.duration);
  };
  row.addEventListener("focusin", () => choose(row));
  track.row = row;
  $("tracks").append(row);
}

function refresh() {
  mixer.apply();
  for (const track of mixer.tracks) track.row.classList.toggle("off", !track.audible);
  syncPlaces();
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
  if (!mixer || video.hidden || !video.src || video.error) return;
  const at = Math.min(mixer.position, video.duration || Infinity);
  if (jumped || Math.abs(video.currentTime - at) > 0.12) video.currentTime = at;
  const should = mixer.playing && at < (video.duration || Infinity);
  if (should && video.paused) video.play().catch(() => {});
  if (!should && !video.paused) video.pause();
}

function tick(here) {
  if (here !== view) return;
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
  for (const track of mixer.tracks) track.row.querySelector(".playhead").style.left = `${(100 * at) / mixer.duration}%`;
  if (performance.now() - (here.followed ?? 0) > 500) {
    here.followed = performance.now();
    followVideo(false);
  }
  requestAnimationFrame(() => tick(here));
}

// ------------------------------------------------------------------------------------- drawings

/** Draw every track; what is begun later takes the place of what is under way. */
async function drawAll(here) {
  const drawing = here.drawing = {};
  const go = () => { here.stay(); return here.drawing === drawing; };
  const channels = here.mixer.tracks.map((t) => mono(t.buffer));
  const whole = new Float32Array(Math.max(...channels.map((c) => c.length)));
  for (const channel of channels) channel.forEach((x, i) => { whole[i] += x; });
  const top = Math.max(...[...channels, whole].map((c) => c.reduce((m, x) => Math.max(m, Math.abs(x)), 0)), 1e-4);
  const rate = here.mixer.context.sampleRate;
  const loudest = await spectrogram(whole, rate, null, 0, go);
  for (const [i, track] of here.mixer.tracks.entries()) {
    if (!go()) return;
    drawWave(track.row.querySelector(".wave"), channels[i], whole.length, top);
    await spectrogram(channels[i], rate, track.row.querySelector(".spectrogram"), loudest, go, whole.length);
  }
}

/** The mean of a buffer's channels. */
function mono(buffer) {
  if (buffer.numberOfChannels === 1) return buffer.getChannelData(0);
  const mean = new Float32Array(buffer.length);
  for (let c = 0; c < buffer.numberOfChannels; c++) {
    buffer.getChannelData(c).forEach((x, i) => { mean[i] += x / buffer.numberOfChannels; });
  }
  return mean;
}

const inkOf = (canvas) => getComputedStyle(canvas.closest(".track").querySelector("h3")).color;

function sized(canvas) {
  const ratio = Math.min(2, window.devicePixelRatio || 1);
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio));
  return canvas.getContext("2d");
}

function drawWave(canvas, samples, length, top) {
  const pen = sized(canvas);
  const { width, height } = canvas;
  pen.fillStyle = inkOf(canvas);
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
async function spectrogram(samples, rate, canvas, loudest, go, length = samples.length) {
  const n = 2048, rows = 64, top = Math.min(12000, rate / 2 - rate / n), bottom = 60;
  const pen = canvas && sized(canvas);
  const width = canvas ? Math.min(canvas.width, 900) : 100;
  const window_ = Float32Array.from({ length: n }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / n));
  const mel = (hz) => Math.log10(1 + hz / 700);
  const edge = (r) => (700 * (10 ** (mel(bottom) + (r / rows) * (mel(top) - mel(bottom))) - 1) * n) / rate;
  const image = pen && new ImageData(width, rows);
  const ink = canvas ? pixel(inkOf(canvas)) : [0, 0, 0];
  const re = new Float32Array(n), im = new Float32Array(n);
  let most = -200, rested = performance.now();
  for (let x = 0; x < width; x++) {
    const start = Math.round(((x + 0.5) / width) * length - n / 2);
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
      if (!go()) return most;
    }
  }
  if (image) {
    const bitmap = await createImageBitmap(image);
    if (go()) pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
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
const redraw = () => mixer && drawAll(view).catch(() => {}); // left meanwhile
addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(redraw, 250); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

// --------------------------------------------------------------------------------- relation map

async function showMap(here) {
  here.map = await (await here.ask(here.job.result.relation.data)).json();
  here.stay();
  $("map-seconds").textContent = Math.round(here.map.duration_s);
  $("map-count").textContent = here.map.basis.length;
  drawMap();
  $("map-frame").hidden = true;
  if (!here.job.result.frame) return;
  $("map-frame").src = await frame(here, "");
  $("map-frame").hidden = false;
}

function drawMap() {
  const { map } = view;
  if (!map) return;
  const all = $("all-rows").checked;
  const here = (name) => map.audible.includes(name);
  const known = (name) => name === "noise" || !learned || learned.includes(name);
  const rows = map.objects.map((name, i) => ({ name, cells: map.posteriors[i] }))
    .filter(({ name, cells }) => here(name) || (name === "noise" && view.job.result.edits) || (known(name) && (all || Math.max(...cells) >= 0.25)));
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
    row.dataset.name = name;
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = titled(name);
    head.className = here(name) ? "audible" : "";
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
  const first = grid.querySelector("button");
  if (first) first.tabIndex = 0;
  $("grid").replaceChildren(grid);
  editing.decorate();
}

function focusCell(button) {
  const before = $("grid").querySelector("[tabindex='0']");
  if (before) before.tabIndex = -1;
  button.tabIndex = 0;
  button.focus();
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
  focusCell(target);
});

let basisPlaying = null;
async function playBasis(column) {
  const here = view;
  const again = basisPlaying === column;
  mixer.stopAlone();
  if (again) return;
  try {
    const bytes = await (await here.ask(`v1/separations/${here.id}/bases/${here.map.basis[column]}.wav`)).arrayBuffer();
    const buffer = await here.mixer.context.decodeAudioData(bytes);
    here.stay();
    await here.mixer.playAlone(buffer, () => here === view && mark(null));
    here.stay();
    followVideo(true);
    mark(column);
  } catch (error) {
    if (here === view && error.name !== "AbortError") complain(error);
  }
}

function mark(column) {
  basisPlaying = column;
  for (const row of $("grid").rows) [...row.cells].forEach((cell, i) => cell.classList.toggle("playing", i - 1 === column));
  if (column === null) { $("basis-line").textContent = ""; return; }
  const { map } = view;
  const best = map.objects.map((name, i) => [map.posteriors[i][column], name]).sort((a, b) => b[0] - a[0]).slice(0, 3);
  $("basis-line").textContent = `Playing basis ${column + 1}, ${Math.round(100 * map.energy[column])} % of the energy: `
    + best.map(([p, name]) => `${titled(name)} ${Math.round(100 * p)} %`).join(", ");
}

// ----------------------------------------------------------------------------------------- keys

const rows = () => [...$("tracks").children];
const chosen = () => rows().find((row) => row.classList.contains("chosen"));

function choose(row) {
  for (const other of rows()) other.classList.toggle("chosen", other === row);
}

const keysAreOn = () => localStorage.keys !== "off";

/** Keys of the mixer; true where one was for it. */
function mixerKey(event) {
  const { key, target } = event;
  const row = chosen();
  const moves = target.closest("input, select, #grid"); // what takes arrows itself
  if (key === " ") {
    if (target.closest("button, input, a, select, summary")) return false;
    toggle();
  } else if ((key === "ArrowLeft" || key === "ArrowRight") && !moves) {
    seek(mixer.position + (key === "ArrowLeft" ? -JUMP_S : JUMP_S));
  } else if ((key === "ArrowUp" || key === "ArrowDown") && !moves && row?.contains(target)) {
    const fader = row.querySelector(".fader input");
    fader.value = +fader.value + (key === "ArrowUp" ? 1 : -1);
    fader.oninput();
  } else if (/^[1-9]$/.test(key) && rows()[key - 1]) {
    rows()[key - 1].focus();
  } else if (/^[ms]$/i.test(key)) {
    (row ?? rows()[0]).querySelector(key.toLowerCase() === "m" ? ".mute" : ".solo").click();
  } else {
    return false;
  }
  return true;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || $("keys").open) return;
  if (event.target.closest("input[type=password], input[type=url], input[type=number], select")) return;
  if (event.key === "Escape") {
    if (view.part === "work") cancel();
    else if (mixer) { mixer.stopAlone(); mixer.pause(); followVideo(true); }
  } else if (keysAreOn() && (event.key === "?" ? ($("keys").showModal(), true) : mixer && mixerKey(event))) {
    event.preventDefault();
  }
});
$("keys-open").onclick = () => $("keys").showModal();
$("keys-on").checked = keysAreOn();
$("keys-on").onchange = () => { localStorage.keys = $("keys-on").checked ? "on" : "off"; };

// --------------------------------------------------------------------------------------- wiring

const isMedia = (file) => /^(video|audio)\//.test(file.type);

/** Take what was dropped or pasted, one file at a time, and say what wasn't taken. */
function take(data) {
  if (view.part === "work") {
    notice("One at a time: this one is still in work. Cancel it, or wait.");
    return;
  }
  const given = [...data.files];
  const folder = [...data.items].some((item) => item.kind === "file" && item.webkitGetAsEntry?.()?.isDirectory);
  if (folder || !given.length) {
    const link = /^https?:/.test(data.getData("text/uri-list") || data.getData("text/plain"));
    notice(folder ? "That is a folder. Drop one video or sound out of it."
      : link ? "That is a link. Save the video first, then drop its file here." : "That is text. Drop a video or sound file here.");
    return;
  }
  const file = given.find(isMedia) ?? given[0];
  const others = given.filter((other) => other !== file).map((other) => other.name);
  const named = others.slice(0, 4).join(", ") + (others.length > 4 ? ` and ${others.length - 4} more` : "");
  separate(file, others.length ? `One at a time: took ${file.name}. Left out: ${named}.` : "");
}

$("file").onchange = () => { if ($("file").files[0]) separate($("file").files[0]); };
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") take(event.dataTransfer);
  });
}
document.addEventListener("paste", (event) => { if (event.clipboardData.files.length) take(event.clipboardData); });
$("cancel").onclick = cancel;
$("play").onclick = toggle;
$("seek").oninput = () => seek(+$("seek").value);
$("source").onchange = () => mixer.listenTo($("source").querySelector(":checked").value === "original");
$("all-rows").onchange = drawMap;
$("again").onclick = () => { start("pushState"); $("file").focus(); };
$("delete").onclick = remove;
addEventListener("popstate", route);
$("token-form").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.token = $("token").value;
  location.reload();
};

/** Offer the objects that the model learned, and show which it did not. */
function offer(model) {
  learned = model.learned;
  const unknown = model.objects.filter((name) => !learned.includes(name));
  const tick = (known) => (name) => {
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", value: name, disabled: !known });
    if (!known) box.setAttribute("aria-describedby", "unlearned-why");
    label.append(box, titled(name));
    return label;
  };
  $("objects").replaceChildren(...learned.map(tick(true)));
  $("unlearned").replaceChildren(...unknown.map(tick(false)));
  $("unlearned-box").hidden = !unknown.length;
  offerStems(learned, titled);
}

async function begin() {
  const model = await (await ask("v1/model")).json();
  offer(model);
  limits = model.limits;
  $("limits").textContent = `Up to ${lasting(limits.max_duration_s)} and ${roundMegabytes(limits.max_upload_bytes)}. `
    + `It stays on this server, and is deleted with its sounds after ${lasting(limits.results_ttl_s)}.`;
  $("knows").textContent = training(model.trained_on);
  if (location.hash) route();
  const examples = await (await ask("v1/examples")).json();
  $("examples").replaceChildren(...examples.map(({ name, url }) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: name.replaceAll("-", " ") });
    button.onclick = () => separate(async (signal) => {
      const blob = await (await ask(url, { signal })).blob();
      return new File([blob], name.replaceAll("-", " "), { type: blob.type });
    });
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
  $("examples-box").hidden = !examples.length;
}
const editing = new Editing({ ask, link, titled, complain, reload, focusCell, view: () => view, learned: () => learned ?? [] });
begin().catch(complain);
