/** The queue: sounds are sent one after the other, with progress, cancelling and retrying. */

import { bytes, floats, ServerError, stream } from "./api.js";
import { element, icon } from "./dom.js";
import { Clip, Overview, Scores } from "./state.js";
import { clock } from "./time.js";

const OVERVIEW_COLUMNS = 60_000; // of a sound, about: 4 MB
const FINEST = 100; // overview columns a second at most
const LENGTH_PATIENCE = 5000; // ms for a player to tell the length of a sound
const BUSY_RETRIES = 20; // when the server has no room

export class Queue {
  #current = null; // the clip that is being sent
  #stop = null; // an AbortController that ends it
  #items = new Map();

  /**
   * @param {import("./state.js").Store} store with clips, selected, model and windows
   * @param {HTMLOListElement} list
   * @param {{onGrow: (clip: Clip) => void, askKey: () => Promise<void>}} handlers
   */
  constructor(store, list, handlers) {
    this.store = store;
    this.list = list;
    this.handlers = handlers;
    store.on(["selected"], () => this.#mark());
  }

  /** Add sounds, and show the first of them. @param {Iterable<File | string>} sources files or addresses */
  add(sources) {
    const clips = Array.from(sources, (source) => new Clip(source, this.store.windows));
    if (!clips.length) return;
    for (const clip of clips) {
      const item = this.#item(clip);
      this.#items.set(clip, item);
      this.list.append(item.root);
      this.#draw(clip);
    }
    this.store.set({ clips: [...this.store.clips, ...clips], selected: clips[0] });
    this.run();
  }

  /** Tag a clip again, for example with other windows. */
  again(clip) {
    Object.assign(clip, { status: "waiting", error: "", notes: [], head: {}, seconds: null });
    Object.assign(clip, { sent: 0, scores: null, overview: null, windows: this.store.windows });
    this.#draw(clip);
    this.handlers.onGrow(clip);
    if (clip === this.#current) this.#stop.abort(); // and `run` processes it again
    else this.run();
  }

  /** Cancel a clip that is not finished; remove one that is. */
  #close(clip) {
    if (clip.status === "waiting") this.#change(clip, { status: "cancelled" });
    else if (clip === this.#current) this.#stop.abort();
    else {
      this.#items.get(clip).root.remove();
      this.#items.delete(clip);
      const clips = this.store.clips.filter((other) => other !== clip);
      const selected = clip === this.store.selected ? (clips.at(-1) ?? null) : this.store.selected;
      this.store.set({ clips, selected });
      clip.release();
    }
  }

  /** Send the waiting clips one after the other, unless this is already running. */
  async run() {
    if (this.#current || !this.store.model) return;
    let clip;
    while ((clip = this.store.clips.find(({ status }) => status === "waiting"))) {
      this.#current = clip;
      this.#stop = new AbortController();
      this.#change(clip, { status: "uploading" });
      try {
        await this.#send(clip, this.#stop.signal);
        this.#change(clip, { status: "done" });
      } catch (error) {
        if (!this.#stop.signal.aborted) this.#change(clip, { status: "failed", error: error.message });
        else if (clip.status !== "waiting") this.#change(clip, { status: "cancelled" });
      }
      this.handlers.onGrow(clip);
    }
    this.#current = null;
  }

  async #send(clip, signal) {
    const { window, hop, scores } = clip.windows;
    const seconds = clip.file && (await duration(clip, signal));
    const overview = Math.min(FINEST, OVERVIEW_COLUMNS / (seconds || 60)).toFixed(3);
    const options = { window, scores, encoding: "float32", overview, ...(hop && { hop }) };
    for (let attempt = 1; ; attempt++) {
      try {
        return await stream(clip.source, options, {
          signal,
          onSent: (sent) => this.#change(clip, { sent }),
          onLine: (line) => this.#take(clip, line),
        });
      } catch (error) {
        if (error.status === 401) await this.handlers.askKey();
        else if (error.status !== 503 || attempt === BUSY_RETRIES) throw error;
        else await pause(error.retryAfter || 1, signal);
        this.#change(clip, { status: "uploading", sent: 0 });
      }
    }
  }

  #take(clip, line) {
    if (line.type === "begin") {
      clip.scores = new Scores(this.store.model.labels);
      clip.length ??= line.seconds;
      this.#change(clip, { status: "tagging" });
    } else if (line.type === "window") addWindow(clip.scores, line);
    else if (line.type === "overview") {
      clip.overview ??= new Overview(line.rate, line.bands);
      clip.overview.add(bytes(line.peaks), bytes(line.mels));
    } else if (line.type === "end") {
      const { type, warnings, ...head } = line;
      Object.assign(clip, { seconds: line.seconds, notes: warnings ?? [], head });
    }
    this.#draw(clip);
    this.handlers.onGrow(clip);
  }

  #change(clip, values) {
    Object.assign(clip, values);
    this.#draw(clip);
  }

  #item(clip) {
    const name = element("span", { className: "name", title: clip.name }, clip.name);
    const state = element("span", { className: "state" });
    const open = element("button", { type: "button", className: "open" }, name, state);
    const close = element("button", { type: "button", className: "icon" }, icon("close"));
    const again = element("button", { type: "button", className: "icon", "aria-label": `Try again: ${clip.name}` }, icon("retry"));
    const progress = element("progress", { max: 1, "aria-label": `Progress of ${clip.name}` });
    const actions = element("span", {}, again, close);
    open.addEventListener("click", () => this.store.set({ selected: clip }));
    close.addEventListener("click", () => this.#close(clip));
    again.addEventListener("click", () => this.again(clip));
    return { root: element("li", {}, open, actions, progress), state, close, again, progress };
  }

  #draw(clip) {
    const item = this.#items.get(clip);
    if (!item) return;
    const { status } = clip;
    const active = status === "uploading" || status === "tagging";
    const whole = clip.seconds ?? clip.length ?? 0;
    item.state.textContent = describe(clip, whole);
    item.state.title = item.state.textContent;
    item.root.className = status;
    item.progress.hidden = !active;
    if (status === "uploading") item.progress.value = clip.sent;
    else if (whole) item.progress.value = clip.scores ? clip.scores.scored / whole : 0;
    else item.progress.removeAttribute("value");
    item.again.hidden = status !== "failed" && status !== "cancelled";
    item.close.setAttribute("aria-label", `${active || status === "waiting" ? "Cancel" : "Remove"}: ${clip.name}`);
    this.#mark();
  }

  #mark() {
    for (const [clip, { root }] of this.#items) {
      if (clip === this.store.selected) root.setAttribute("aria-current", "true");
      else root.removeAttribute("aria-current");
    }
  }
}

function describe(clip, whole) {
  switch (clip.status) {
    case "uploading":
      return clip.file && clip.sent < 1 ? `uploading, ${Math.floor(100 * clip.sent)} %` : "waiting for the server";
    case "tagging":
      return `tagging, ${clock(clip.scores.scored, 0)}${whole ? ` of ${clock(whole, 0)}` : ""}`;
    case "done":
      return clock(clip.seconds, 1) + (clip.notes.length ? `; ${clip.notes.join("; ")}` : "");
    case "failed":
      return clip.error;
    default:
      return clip.status;
  }
}

function addWindow(scores, { start, end, silent, edges, scores: text }) {
  const probs = floats(text);
  const count = scores.labels.length;
  if (edges?.length) {
    for (let column = 0; column + 1 < edges.length; column++)
      scores.add(edges[column], edges[column + 1], probs.subarray(column * count, (column + 1) * count), silent);
  } else scores.add(start, end, probs, silent);
}

/**
 * The length of a sound in the browser's player; null if it cannot play the sound, or reports no length in time.
 *
 * @throws {DOMException} AbortError, when `signal` was aborted
 */
function duration(clip, signal) {
  return new Promise((resolve, reject) => {
    signal.throwIfAborted();
    const player = new Audio();
    const end = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", cancel);
      player.onloadedmetadata = player.onerror = null;
      player.removeAttribute("src");
      player.load(); // so that it reads no further
    };
    const done = (length) => {
      end();
      clip.length = Number.isFinite(length) && length > 0 ? length : null;
      resolve(clip.length);
    };
    const cancel = () => {
      end();
      reject(signal.reason);
    };
    const timer = setTimeout(done, LENGTH_PATIENCE, null);
    signal.addEventListener("abort", cancel);
    player.preload = "metadata";
    player.onloadedmetadata = () => done(player.duration);
    player.onerror = () => done(null);
    player.src = clip.url;
  });
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new ServerError("cancelled"));
    });
  });
}
