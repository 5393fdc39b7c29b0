// How sounds are to be written, and mixes of them as files.

const $ = (id) => document.getElementById(id);
const FORMATS = { wav: "WAV", flac: "FLAC", mp3: "MP3" };
const option = (value, textContent) => Object.assign(document.createElement("option"), { value, textContent });

/** Offer the objects of which one alone may be set apart; `titled` makes names readable. */
export function offerStems(names, titled) {
  $("two-stems").replaceChildren(option("", "every object"), ...names.map((name) => option(name, titled(name))));
}

/** Add to a form what "More options" says. */
export function addOptions(form) {
  form.append("format", $("format").value);
  form.append("mono", $("mono").checked);
  if ($("two-stems").value) form.append("two_stems", $("two-stems").value);
}

/** What a mixer's faders, mutes and solos let through, as the service takes it. */
export const gainsOf = (mixer) => mixer.tracks.map((t) => `${t.name}:${t.audible ? +t.level.toFixed(4) : 0}`).join(",");

/** Let a view's mix be saved as a sound and, where there are pictures, as a video; `complain` tells what goes wrong. */
export function offerMix(here, complain) {
  const { job: { result } } = here;
  const kinds = Object.keys(FORMATS).filter((kind) => result.mixture[kind]);
  $("mix-format").replaceChildren(...kinds.map((kind) => option(kind, FORMATS[kind])));
  $("mix-format").value = kinds.includes(result.format) ? result.format : "wav";
  $("mix-video").hidden = !result.mix.video;
  $("mix-line").textContent = "";
  $("mix-sound").onclick = () => {
    const kind = $("mix-format").value;
    save(here, `${result.mix.sound}?format=${kind}&gains=`, kind, complain);
  };
  $("mix-video").onclick = () => save(here, `${result.mix.video}?gains=`, result.mix.video.split(".").pop(), complain);
}

/** Fetch a mix as the faders now are, and save it; one at a time. */
async function save(here, url, kind, complain) {
  if (here.mixing) return;
  here.mixing = true;
  $("mix-line").textContent = "Mixing …";
  try {
    const answer = await here.ask(url + encodeURIComponent(gainsOf(here.mixer)));
    const note = answer.headers.get("Avsep-Note");
    const href = here.url(await answer.blob());
    here.stay();
    const name = `${(here.name ?? "mix").replace(/\.[^.]*$/, "")}-mix.${kind}`;
    Object.assign(document.createElement("a"), { href, download: name }).click();
    $("mix-line").textContent = `Saved as ${name}${note ? `: ${note}` : ""}.`;
  } catch (error) {
    if (here.signal.aborted) return;
    $("mix-line").textContent = "";
    complain(error);
  } finally {
    here.mixing = false;
  }
}
