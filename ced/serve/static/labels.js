/** The label filter: typing filters at once; a ticked label stays when the search is cleared. */

import { byId, element, icon } from "./dom.js";

const MOST = 60; // in the list

export class LabelFilter {
  #kept = new Set(); // indices

  /**
   * @param {string[]} labels
   * @param {{peaks: () => Float32Array | null, onChange: (classes: number[] | null) => void}} handlers
   *   peaks: the highest probability of each class in the sound that is shown; onChange gets null for all classes
   */
  constructor(labels, { peaks, onChange }) {
    this.labels = labels;
    this.folded = labels.map((label) => label.toLowerCase());
    this.peaks = peaks;
    this.onChange = onChange;
    this.search = byId("search");
    this.choices = byId("choices");
    this.search.addEventListener("input", () => this.#changed());
    this.search.addEventListener("focus", () => this.#open(true));
    const box = byId("labels");
    box.addEventListener("focusout", ({ relatedTarget }) => {
      if (!box.contains(relatedTarget)) this.#open(false);
    });
    box.addEventListener("keydown", (press) => {
      if (press.key === "Escape" && !this.choices.hidden) {
        this.search.focus();
        this.#open(false);
      } else if (press.target === this.search && press.key === "ArrowDown") {
        this.#open(true);
        this.choices.querySelector("input")?.focus();
      } else if (press.target === this.search && press.key === "Enter") {
        press.preventDefault();
        this.choices.querySelector("input")?.click();
      } else return;
      press.stopPropagation();
    });
    // A press on the list must not take the focus from the search, which would close the list.
    this.choices.addEventListener("pointerdown", (press) => press.preventDefault());
  }

  /** The chosen classes, in their order; null: all. */
  get classes() {
    const matches = this.#matches();
    if (!matches && !this.#kept.size) return null;
    return [...new Set([...this.#kept, ...(matches ?? [])])].sort((one, other) => one - other);
  }

  #matches() {
    const words = this.search.value.trim().toLowerCase();
    if (!words) return null;
    return [...this.folded.keys()].filter((index) => this.folded[index].includes(words));
  }

  #open(open) {
    this.choices.hidden = !open;
    if (open) this.#draw();
  }

  #changed() {
    this.#open(true);
    this.#chips();
    this.onChange(this.classes);
  }

  #draw() {
    const matches = this.#matches();
    const found = matches ?? [...this.labels.keys()];
    const peaks = this.peaks();
    const order = found.toSorted((one, other) => (peaks ? peaks[other] - peaks[one] : 0) || one - other);
    byId("matches").textContent = matches
      ? `${matches.length} of ${this.labels.length} labels match`
      : `${this.labels.length} labels, most probable first`;
    const items = order.slice(0, MOST).map((index) => {
      const box = element("input", { type: "checkbox", checked: this.#kept.has(index) });
      box.addEventListener("change", () => this.#keep(index, box.checked));
      const peak = element("small", {}, peaks ? peaks[index].toFixed(2) : "");
      return element("li", {}, element("label", {}, box, element("span", {}, this.labels[index]), peak));
    });
    this.choices.querySelector("ul").replaceChildren(...items);
  }

  #keep(index, kept) {
    if (kept) this.#kept.add(index);
    else this.#kept.delete(index);
    if (kept && this.search.value) {
      this.search.value = ""; // otherwise the matches would stay chosen
      this.#draw();
    }
    this.#chips();
    this.onChange(this.classes);
  }

  #chips() {
    const chips = [...this.#kept].map((index) => {
      const label = this.labels[index];
      const chip = element("button", { type: "button", "aria-label": `Remove the label ${label}` }, `${label} `, icon("close"));
      chip.addEventListener("click", () => {
        this.#keep(index, false);
        this.search.focus();
      });
      return chip;
    });
    byId("chosen").replaceChildren(...chips);
  }
}
