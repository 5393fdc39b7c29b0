// Where the objects are in the picture: point at one to see its name, choose it to hear it alone.

const $ = (id) => document.getElementById(id);
const HALF = 0.5; // of its map's maximum in a picture: what belongs to an object
const titled = (name) => name.replaceAll("_", " ");

let places = null; // of the result that is shown

/** Show a result's places over its picture, where there are any, until its view is left. */
export async function showPlaces(here) {
  hidePlaces();
  const { job: { result }, signal } = here;
  if (!result.locations) return;
  const answer = await (await here.ask(result.locations)).json();
  here.stay();
  const known = placed(result, answer.objects);
  if (!known.length) return;
  const bytes = Uint8Array.from(atob(answer.maps), (c) => c.charCodeAt(0));
  places = { ...answer, bytes, known, mixer: here.mixer, pointer: null, pointed: null, focused: null, chosen: null };
  showChips();
  $("seen-box").hidden = $("places").hidden = false;
  listen(signal);
  signal.addEventListener("abort", hidePlaces);
  syncPlaces();
}

/** Say anew which of the objects are heard, once a result was corrected. */
export function updatePlaces({ job: { result } }) {
  const known = places ? placed(result, places.objects) : [];
  if (!known.length) return hidePlaces();
  Object.assign(places, { known, pointed: null, focused: null, chosen: null });
  showChips();
  syncPlaces();
  draw();
}

const placed = ({ objects }, names) => objects.filter((o) => o.boxes?.length && names.includes(o.name));

function showChips() {
  $("seen").replaceChildren(...places.known.map(chip));
  $("seen").querySelector("button").tabIndex = 0;
}

function hidePlaces() {
  places = null;
  $("seen").replaceChildren();
  $("places-said").textContent = "";
  $("seen-box").hidden = $("places").hidden = true;
  draw();
}

/** Show on every object's button whether it is heard alone. */
export function syncPlaces() {
  if (!places) return;
  for (const button of $("seen").querySelectorAll("button")) {
    const track = trackOf(button.value);
    if (track) button.setAttribute("aria-pressed", track.solo);
  }
}

const trackOf = (name) => places.mixer.tracks.find((t) => t.name === name);
const objectOf = (name) => places.known.find((o) => o.name === name);
const captionOf = ({ name, silent, visible }) =>
  titled(name) + (silent ? (visible === false ? " – silent" : " – visible, silent") : "");

function chip(object) {
  const button = Object.assign(document.createElement("button"), {
    type: "button", value: object.name, textContent: captionOf(object), tabIndex: -1,
  });
  if (object.silent) button.setAttribute("aria-disabled", "true");
  button.style.setProperty("--colour", colourOf(object.name));
  const item = document.createElement("li");
  item.append(button);
  return item;
}

const colourOf = (name) => trackOf(name)?.row.style.getPropertyValue("--colour") || "var(--rest)";

function listen(signal) {
  const options = { signal };
  const cover = $("places"), list = $("seen");
  cover.addEventListener("pointermove", (event) => { places.pointer = event; point(); }, options);
  cover.addEventListener("pointerleave", () => { places.pointer = places.pointed = null; draw(); }, options);
  cover.addEventListener("click", (event) => {
    const name = objectAt(event);
    if (name) choose(name);
  }, options);
  list.addEventListener("focusin", (event) => { places.focused = event.target.value; draw(); }, options);
  list.addEventListener("focusout", () => { places.focused = null; draw(); }, options);
  list.addEventListener("pointerover", (event) => { places.pointed = event.target.value || null; draw(); }, options);
  list.addEventListener("pointerleave", () => { places.pointed = null; draw(); }, options);
  list.addEventListener("click", (event) => { if (event.target.value) choose(event.target.value); }, options);
  list.addEventListener("keydown", move, options);
  $("video").addEventListener("timeupdate", point, options);
  $("video").addEventListener("seeked", point, options);
  addEventListener("resize", draw, options);
}

/** One button is in the tab order; arrows move on from it. */
function move(event) {
  const buttons = [...$("seen").querySelectorAll("button")];
  const at = buttons.indexOf(event.target);
  const next = { ArrowLeft: at - 1, ArrowUp: at - 1, ArrowRight: at + 1, ArrowDown: at + 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  event.stopPropagation(); // the mixer's keys take arrows, too
  if (!buttons[next]) return;
  event.target.tabIndex = -1;
  buttons[next].tabIndex = 0;
  buttons[next].focus();
}

/** Hear an object alone, or, where that is so already, everything again; of a silent one say that. */
function choose(name) {
  const track = trackOf(name);
  places.chosen = name;
  if (!track) {
    say(`${captionOf(objectOf(name))}: there is nothing to hear.`);
  } else {
    const others = places.mixer.tracks.some((t) => t !== track && t.solo);
    const on = !track.solo || others;
    for (const t of places.mixer.tracks) if (t.solo !== (on && t === track)) t.row.querySelector(".solo").click();
    if (!on) places.chosen = null;
    say(on ? `You hear ${titled(name)} alone.` : "You hear everything again.");
  }
  draw();
}

const say = (text) => { $("places-said").textContent = text; };

/** Which of the pictures with maps is shown now. */
function picture() {
  if ($("video").hidden) return places.frame;
  const at = $("video").currentTime;
  const apart = places.times_s.map((t) => Math.abs(t - at));
  return apart.indexOf(Math.min(...apart));
}

/** An object's map in a picture, where a box says that it is there; else null. */
function mapOf(name, number) {
  const time = places.times_s[number];
  const found = objectOf(name).boxes.find((b) => Math.abs(b.time_s - time) < 1e-3);
  if (!found) return null;
  const size = places.height * places.width;
  const start = (number * places.objects.length + places.objects.indexOf(name)) * size;
  const cells = places.bytes.subarray(start, start + size);
  return { cells, peak: Math.max(...cells), box: found.box };
}

/** Where the shown picture lies in the screen, which may be wider or higher: left, top, width and height in pixels. */
function frameBox() {
  const shown = $("video").hidden ? $("still") : $("video");
  const [width, height] = shown === $("video") ? [shown.videoWidth, shown.videoHeight] : [shown.naturalWidth, shown.naturalHeight];
  const { clientWidth, clientHeight } = $("places");
  if (shown.hidden || !width || !height) return null;
  const scale = Math.min(clientWidth / width, clientHeight / height);
  return [(clientWidth - width * scale) / 2, (clientHeight - height * scale) / 2, width * scale, height * scale];
}

/** The object under a pointer: of those whose place it is in, the one that is seen best there. */
function objectAt(event) {
  const frame = frameBox();
  if (!frame) return null;
  const screen = $("places").getBoundingClientRect();
  const [left, top, width, height] = frame;
  const column = Math.floor(((event.clientX - screen.left - left) / width) * places.width);
  const row = Math.floor(((event.clientY - screen.top - top) / height) * places.height);
  if (column < 0 || row < 0 || column >= places.width || row >= places.height) return null;
  let best = null, most = 0;
  for (const { name } of places.known) {
    const map = mapOf(name, picture());
    const value = map ? map.cells[row * places.width + column] : 0;
    if (map && value >= HALF * map.peak && value > most) [best, most] = [name, value];
  }
  return best;
}

/** Follow the pointer, and the picture under it. */
function point() {
  if (!places) return;
  if (places.pointer) places.pointed = objectAt(places.pointer);
  draw();
}

/** Tint the object that is pointed at, has the focus, or was chosen, and write its name beside it. */
function draw() {
  const name = places && (places.pointed ?? places.focused ?? places.chosen);
  const frame = name && frameBox();
  const map = frame && mapOf(name, picture());
  $("places").classList.toggle("on", Boolean(places?.pointed));
  $("place").hidden = !frame;
  $("place-tint").hidden = $("place-box").hidden = !map;
  if (!frame) return;
  const [left, top, width, height] = frame;
  const put = (element, [x, y, right, bottom]) => Object.assign(element.style, {
    left: `${left + x * width}px`, top: `${top + y * height}px`,
    width: `${(right - x) * width}px`, height: `${(bottom - y) * height}px`,
  });
  const caption = captionOf(objectOf(name));
  $("place").style.setProperty("--colour", colourOf(name));
  $("place-name").textContent = map ? caption : `${caption} – not in this picture`;
  put($("place-name"), map ? map.box : [0, 0, 1, 1]);
  Object.assign($("place-name").style, { width: "", height: "" });
  if (!map) return;
  put($("place-box"), map.box);
  put($("place-tint"), [0, 0, 1, 1]);
  tint($("place-tint"), map);
}

/** Draw a map: the surer, the more of its colour. */
function tint(canvas, { cells, peak }) {
  Object.assign(canvas, { width: places.width, height: places.height });
  const pen = canvas.getContext("2d");
  pen.fillStyle = getComputedStyle($("place-box")).borderTopColor;
  cells.forEach((value, i) => {
    pen.globalAlpha = 0.6 * (value / peak) ** 2;
    pen.fillRect(i % places.width, Math.floor(i / places.width), 1, 1);
  });
}
