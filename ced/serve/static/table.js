/** The table of events: sortable, each row with buttons that play it and save it. */

import { element, icon } from "./dom.js";
import { clock } from "./time.js";

const MOST_ROWS = 300; // at first; the rest on request
const NONE = "No events at this threshold.";
const FIELDS = ["onset", "offset", "index", "peak"]; // of an event
const COLUMNS = [
  { name: "Start", value: ({ onset }) => onset, kind: "number" },
  { name: "End", value: ({ offset }) => offset, kind: "number end" },
  { name: "Length", value: ({ onset, offset }) => offset - onset, kind: "number" },
  { name: "Label", value: ({ index }, labels) => labels[index], kind: "label" },
  { name: "Probability", value: ({ peak }) => peak, kind: "number" },
];

export class Table {
  #events = [];
  #shown = []; // in the order of the rows
  #picked = null;
  #most = MOST_ROWS;
  #order = { column: COLUMNS[0], sign: 1 };

  /**
   * @param {{table: HTMLTableElement, more: HTMLButtonElement}} parts
   * @param {string[]} labels
   * @param {{onPick: (event: object) => void, onPlay: (event: object) => void, onSave: (event: object) => void}} handlers
   */
  constructor({ table, more }, labels, handlers) {
    this.body = table.tBodies[0];
    this.more = more;
    this.labels = labels;
    this.handlers = handlers;
    this.playable = true;
    const heads = COLUMNS.map((column) => {
      const button = element("button", { type: "button" }, column.name);
      const head = element("th", { className: column.kind, scope: "col" }, button);
      button.addEventListener("click", () => this.#sort(column));
      return head;
    });
    this.heads = new Map(COLUMNS.map((column, index) => [column, heads[index]]));
    const [play, save] = ["Play", "Save"].map((name) =>
      element("th", { scope: "col" }, element("span", { className: "unseen" }, name)),
    );
    table.tHead.append(element("tr", {}, play, ...heads, save));
    more.addEventListener("click", () => {
      this.#most = Infinity;
      this.#draw();
    });
    this.body.addEventListener("click", ({ target }) => {
      const event = this.#shown[target.closest("tr")?.dataset.place];
      if (!event) return;
      const action = target.closest("button")?.dataset.action;
      handlers.onPick(event);
      if (action === "play") handlers.onPlay(event);
      if (action === "save") handlers.onSave(event);
    });
    this.#sort(COLUMNS[0], 1);
    this.#fillRows();
  }

  /** Show these events. */
  fill(events, playable) {
    if (playable !== this.playable) this.#shown = [];
    this.#events = events;
    this.playable = playable;
    this.#draw();
  }

  /** Show the first rows only, as for another sound. */
  reset() {
    this.#most = MOST_ROWS;
  }

  /** Mark an event. */
  pick(event) {
    this.#picked = event;
    this.#mark(true);
  }

  #sort(column, sign = column === this.#order.column ? -this.#order.sign : column.name === "Probability" ? -1 : 1) {
    this.heads.get(this.#order.column).removeAttribute("aria-sort");
    this.#order = { column, sign };
    this.heads.get(column).setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    this.#draw();
  }

  #draw() {
    const { column, sign } = this.#order;
    const key = (event) => column.value(event, this.labels);
    const compare = (one, other) => (one < other ? -1 : one > other ? 1 : 0);
    const before = this.#shown;
    this.#shown = this.#events.toSorted((one, other) => sign * compare(key(one), key(other))).slice(0, this.#most);
    const same = (event, place) => FIELDS.every((field) => event[field] === before[place]?.[field]);
    // While a long sound is being tagged, the first rows stay the same.
    if (this.#shown.length !== before.length || !this.#shown.every(same)) this.#fillRows();
    this.more.hidden = this.#shown.length === this.#events.length;
    this.more.textContent = `Show all ${this.#events.length} events`;
    this.#mark(false);
  }

  #fillRows() {
    this.body.replaceChildren(...this.#shown.map((event, place) => this.#row(event, place)));
    if (!this.#shown.length)
      this.body.append(element("tr", {}, element("td", { colSpan: COLUMNS.length + 2, className: "empty" }, NONE)));
  }

  #row({ onset, offset, index, peak }, place) {
    const label = this.labels[index];
    const span = `${label}, ${clock(onset, 2)} to ${clock(offset, 2)}`;
    const button = (action, name, disabled) => {
      const made = element("button", { type: "button", title: `${name} ${span}`, disabled, "aria-label": `${name} ${span}` }, icon(action));
      made.dataset.action = action;
      return element("td", {}, made);
    };
    const part = element("span");
    part.style.width = `${100 * peak}%`;
    const row = element(
      "tr",
      {},
      button("play", "Play", !this.playable),
      element("td", { className: "number" }, clock(onset, 2)),
      element("td", { className: "number end" }, clock(offset, 2)),
      element("td", { className: "number" }, (offset - onset).toFixed(2)),
      element("td", {}, label),
      element("td", { className: "number" }, element("span", { className: "bar" }, part), peak.toFixed(2)),
      button("save", "Save as WAV:", false),
    );
    row.dataset.place = place;
    return row;
  }

  #mark(reveal) {
    for (const row of this.body.querySelectorAll(".picked")) {
      row.classList.remove("picked");
      row.removeAttribute("aria-current");
    }
    const row = this.#picked && this.body.children[this.#shown.indexOf(this.#picked)];
    if (!row) return;
    row.classList.add("picked");
    row.setAttribute("aria-current", "true");
    if (reveal) row.scrollIntoView({ block: "nearest" });
  }
}
