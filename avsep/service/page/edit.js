// Corrections by hand: bases moved in the relation map, objects added or taken away, spans of time marked.
// Every change is sent whole, and the sounds are fetched again. `page` is what page.js lends: see its end.

const REST = "_rest";
const DRAG_PX = 8; // a press that moves less is a click
const NONE = { moves: [], add: [], remove: [], spans: [] };
const $ = (id) => document.getElementById(id);
const option = (value, text) => Object.assign(document.createElement("option"), { value, textContent: text });

export class Editing {
  constructor(page) {
    this.page = page;
    this.wire();
  }

  /** Offer a result's corrections; what an upload came with is made first. */
  async show(here) {
    const { result } = here.job;
    $("edit").hidden = true; // until it is known what was corrected before
    if (!result.edits) return;
    here.edits = { ...NONE, ...(await (await here.ask(result.edits)).json()) };
    here.stay();
    this.page.link($("edits-download"), result.edits, `edits-${here.id.slice(0, 8)}.json`);
    $("edit").hidden = false;
    this.list();
    const file = here.fresh && $("edits-file").files[0];
    here.fresh = false;
    if (!file) return;
    $("edits-file").value = "";
    try {
      await this.send(JSON.parse(await file.text()), `Made the corrections of ${file.name}.`);
    } catch (error) {
      if (error instanceof SyntaxError) this.page.complain(`${file.name} is no JSON: give a file of downloaded corrections`);
      else throw error;
    }
  }

  // ------------------------------------------------------------------------------------ changes

  /** Change a copy of the corrections and send it; what is refused leaves them as they are. */
  change(make, said) {
    const next = structuredClone(this.page.view().edits);
    make(next);
    return this.send(next, said);
  }

  /** Send corrections, one after another, and fetch what then sounds. */
  send(edits, said) {
    const here = this.page.view();
    const work = async () => {
      $("edit").setAttribute("aria-busy", "true");
      try {
        const answer = await this.page.ask(`v1/separations/${here.id}`, {
          method: "PATCH", body: JSON.stringify(edits), signal: here.signal, headers: { "Content-Type": "application/json" },
        });
        here.job = await answer.json();
        here.stay();
        here.edits = { ...NONE, ...edits };
        await this.page.reload(here);
        $("alert").hidden = true;
        $("edit-line").textContent = said;
        this.list();
      } catch (error) {
        if (here === this.page.view() && error.name !== "AbortError") this.page.complain(error);
      } finally {
        $("edit").removeAttribute("aria-busy");
      }
    };
    here.changing = (here.changing ?? Promise.resolve()).then(work);
    return here.changing;
  }

  /** Give a column's basis to an object, or to the rest. */
  move(column, to) {
    const { titled } = this.page;
    const basis = this.page.view().map.basis[column];
    return this.change((edits) => {
      edits.moves = edits.moves.filter((m) => m.window || m.basis !== basis);
      edits.moves.push({ window: 0, basis, to });
      edits.remove = edits.remove.filter((name) => name !== to);
    }, `Basis ${column + 1} now goes to ${titled(to)}.`);
  }

  add(name) {
    return this.change((edits) => {
      edits.remove = edits.remove.filter((other) => other !== name);
      edits.add.push(name);
    }, `Added ${this.page.titled(name)}.`);
  }

  /** Take an object away, and whatever made it be there. */
  async remove(name) {
    const said = `Took ${this.page.titled(name)} away.`;
    const strip = (edits) => {
      edits.moves = edits.moves.filter((m) => m.to !== name);
      edits.spans = edits.spans.filter((s) => s.object !== name);
      edits.add = edits.add.filter((other) => other !== name);
    };
    const { edits } = this.page.view();
    if (edits.add.includes(name) || edits.moves.some((m) => m.to === name)) await this.change(strip, said);
    if (this.there().includes(name)) await this.change((e) => { strip(e); e.remove.push(name); }, said);
  }

  mark(span) {
    const what = span.present ? "sounds" : "is silent";
    return this.change((edits) => edits.spans.push(span), `${this.page.titled(span.object)} ${what} there.`);
  }

  /** The objects of the result, silent ones, too. */
  there() {
    return this.page.view().job.result.objects.map((o) => o.name);
  }

  // ------------------------------------------------------------------------------------- what is seen

  /** List what was corrected, each with a button that takes it back, and fill the choices. */
  list() {
    const { titled } = this.page;
    const { edits, map } = this.page.view();
    if (!edits) return;
    const column = (m) => (m.window === 0 && map ? map.basis.indexOf(m.basis) : m.basis);
    const lines = [
      ...edits.moves.map((m) => [m, "moves", `basis ${column(m) + 1}${m.window ? ` of window ${m.window + 1}` : ""} goes to ${titled(m.to)}`]),
      ...edits.add.map((name) => [name, "add", `${titled(name)} is there`]),
      ...edits.remove.map((name) => [name, "remove", `${titled(name)} is not there`]),
      ...edits.spans.map((s) => [s, "spans", `${titled(s.object)} ${s.present ? "sounds" : "is silent"} from ${s.start_s} to ${s.end_s} s`]),
    ];
    $("edits").replaceChildren(...lines.map(([entry, kind, text]) => {
      const item = document.createElement("li");
      const undo = Object.assign(document.createElement("button"), { type: "button", textContent: "Undo" });
      undo.setAttribute("aria-label", `Undo: ${text}`);
      undo.onclick = () => {
        $("edit-title").focus();
        this.change((e) => { e[kind] = e[kind].filter((x) => JSON.stringify(x) !== JSON.stringify(entry)); }, `Undone: ${text}.`);
      };
      item.append(text, undo);
      return item;
    }));
    $("edits-undo").hidden = !lines.length;
    this.choices();
  }

  choices() {
    const { titled } = this.page;
    const { map, job } = this.page.view();
    const there = this.there();
    const names = [...new Set([...there, ...this.page.learned()])];
    const fill = (id, entries) => {
      const chosen = $(id).value;
      $(id).replaceChildren(...entries.map(([value, text]) => option(value, text)));
      if (entries.some(([value]) => String(value) === chosen)) $(id).value = chosen;
    };
    if (map) fill("edit-basis", map.basis.map((_, column) => [column, `${column + 1}, now of ${titled(this.owner(column))}`]));
    fill("edit-to", [...names.map((name) => [name, titled(name)]), [REST, titled(REST)]]);
    fill("edit-object", names.map((name) => [name, titled(name) + (there.includes(name) ? "" : " (not there)")]));
    fill("edit-span-object", names.map((name) => [name, titled(name)]));
    $("edit-start").max = $("edit-end").max = job.result.duration_s;
    this.able();
  }

  able() {
    const here = this.there().includes($("edit-object").value);
    $("edit-add").disabled = here;
    $("edit-remove").disabled = !here;
  }

  /** Whose most of a column's basis is. */
  owner(column) {
    const { map } = this.page.view();
    const shares = map.shares.map((row) => row[column]);
    return map.audible[shares.indexOf(Math.max(...shares))];
  }

  /** Mark in the grid which row has each basis. */
  decorate() {
    const { map, job } = this.page.view();
    if (!job.result.edits) return;
    const rows = this.rows();
    map.basis.forEach((_, column) => {
      const row = rows.find((r) => this.object(r) === this.owner(column));
      const button = row?.cells[column + 1].querySelector("button");
      if (!button) return;
      button.classList.add("owner");
      button.setAttribute("aria-label", `${button.getAttribute("aria-label")}. Its sound goes here`);
    });
    this.choices();
  }

  rows() {
    return [...$("grid").rows].filter((row) => row.dataset.name);
  }

  object(row) {
    return row.dataset.name === "noise" ? REST : row.dataset.name;
  }

  // ------------------------------------------------------------------------- pointer and keyboard

  wire() {
    const grid = $("grid");
    grid.addEventListener("pointerdown", (event) => this.press(event));
    grid.addEventListener("keydown", (event) => this.key(event), true);
    grid.addEventListener("focusin", (event) => {
      const cell = event.target.closest("td");
      if (cell && !$("edit").hidden) $("edit-basis").value = cell.cellIndex - 1;
    });
    $("edit-move").onclick = () => this.move(+$("edit-basis").value, $("edit-to").value);
    $("edit-add").onclick = () => this.add($("edit-object").value);
    $("edit-remove").onclick = () => this.remove($("edit-object").value);
    $("edit-object").onchange = () => this.able();
    $("edits-undo").onclick = () => { $("edit-title").focus(); this.send(structuredClone(NONE), "Undid all corrections."); };
    $("edit-span").onsubmit = (event) => {
      event.preventDefault();
      this.mark({
        start_s: +$("edit-start").value, end_s: +$("edit-end").value,
        object: $("edit-span-object").value, present: $("edit-present").value === "true",
      });
    };
  }

  /** Follow a press on a cell; where it moves far enough, the basis goes to the row it ends on. */
  press(event) {
    const cell = event.target.closest("td");
    if (!cell?.parentElement.dataset.name || $("edit").hidden || event.button) return;
    const from = [event.clientX, event.clientY];
    const over = (e) => document.elementFromPoint(e.clientX, e.clientY)?.closest("#grid tr[data-name]");
    let dragged = null;
    const aim = (row) => { for (const other of this.rows()) other.classList.toggle("target", other === row); };
    const moved = (e) => {
      if (!dragged && Math.hypot(e.clientX - from[0], e.clientY - from[1]) < DRAG_PX) return;
      dragged ??= document.body.appendChild(Object.assign(document.createElement("i"), { className: "dragged" }));
      dragged.style.transform = `translate(${e.clientX}px, ${e.clientY}px)`;
      aim(over(e));
    };
    const done = (e) => {
      for (const [kind, listener] of listeners) removeEventListener(kind, listener);
      aim(null);
      if (!dragged) return;
      dragged.remove();
      addEventListener("click", swallow, true); // the press ends as no click
      setTimeout(() => removeEventListener("click", swallow, true));
      const row = e.type === "pointerup" && over(e);
      if (row && row !== cell.parentElement) this.move(cell.cellIndex - 1, this.object(row));
    };
    const swallow = (e) => { e.stopPropagation(); e.preventDefault(); };
    const listeners = [["pointermove", moved], ["pointerup", done], ["pointercancel", done]];
    for (const [kind, listener] of listeners) addEventListener(kind, listener);
  }

  /** Alt and an arrow move the focused cell's basis up or down a row, and the focus with it. */
  key(event) {
    const cell = event.target.closest("td");
    if (!cell || !event.altKey || !["ArrowUp", "ArrowDown"].includes(event.key) || $("edit").hidden) return;
    event.preventDefault();
    event.stopPropagation();
    const rows = this.rows();
    const column = cell.cellIndex - 1;
    const at = rows.findIndex((row) => this.object(row) === this.owner(column));
    const row = rows[(at < 0 ? rows.indexOf(cell.parentElement) : at) + (event.key === "ArrowDown" ? 1 : -1)];
    if (!row) return;
    const { name } = row.dataset;
    this.move(column, this.object(row)).then(() => {
      const target = this.rows().find((r) => r.dataset.name === name)?.cells[column + 1].querySelector("button");
      if (target) this.page.focusCell(target);
    });
  }
}
