/** The state of the page: the model, the sounds and their scores, and the selection that is shown. */

/** A value with parts that can be observed. */
export class Store {
  #listeners = new Set();

  constructor(values) {
    Object.assign(this, values);
  }

  /** Change some parts, and call every listener with the names of those that changed. */
  set(values) {
    const changed = new Set(Object.keys(values).filter((name) => this[name] !== values[name]));
    if (!changed.size) return;
    Object.assign(this, values);
    for (const listener of this.#listeners) listener(changed);
  }

  /** Call `listener` with the set of names after each change of one of `names`. */
  on(names, listener) {
    this.#listeners.add((changed) => names.some((name) => changed.has(name)) && listener(changed));
  }
}

/** The probabilities of all classes for the windows of a sound, in order of time. */
export class Scores {
  length = 0; // windows
  starts = []; // seconds
  ends = [];
  silent = []; // whether the window was not scored
  #probs = new Float32Array(0); // (windows or more, classes)

  /** @param {string[]} labels */
  constructor(labels) {
    this.labels = labels;
    this.peaks = new Float32Array(labels.length); // the highest probability of each class
  }

  /** Add the next window. @param {Float32Array} probs one for each class */
  add(start, end, probs, silent = false) {
    const count = this.labels.length;
    if (probs.length !== count) throw new Error(`a window has ${probs.length} probabilities for ${count} classes`);
    const needed = (this.length + 1) * count;
    if (needed > this.#probs.length) {
      const larger = new Float32Array(Math.max(2 * needed, 64 * count));
      larger.set(this.#probs);
      this.#probs = larger;
    }
    this.#probs.set(probs, this.length * count);
    for (let index = 0; index < count; index++) this.peaks[index] = Math.max(this.peaks[index], probs[index]);
    this.starts.push(start);
    this.ends.push(end);
    this.silent.push(silent);
    this.length++;
  }

  /** The probability of class `index` in a window. */
  at(window, index) {
    return this.#probs[window * this.labels.length + index];
  }

  /** Seconds of the sound that have been scored. */
  get scored() {
    return this.length ? this.ends[this.length - 1] : 0;
  }
}

/** Peaks and log-mel columns of a sound, evenly spaced. */
export class Overview {
  columns = 0;
  loudest = 0; // of all bands so far
  #peaks = new Uint8Array(0);
  #mels = new Uint8Array(0);

  /** @param {number} rate columns a second @param {number} bands mel bands of a column */
  constructor(rate, bands) {
    this.rate = rate;
    this.bands = bands;
  }

  /**
   * Add the next columns: peaks (n) and mel bands (n, bands), low frequencies first; both are
   * 0 to 255, mel bands in steps of 0.4 dB.
   */
  add(peaks, mels) {
    const needed = this.columns + peaks.length;
    if (needed > this.#peaks.length) {
      const room = Math.max(2 * needed, 4096);
      this.#peaks = grown(this.#peaks, room);
      this.#mels = grown(this.#mels, room * this.bands);
    }
    this.#peaks.set(peaks, this.columns);
    this.#mels.set(mels, this.columns * this.bands);
    this.columns = needed;
    for (const mel of mels) if (mel > this.loudest) this.loudest = mel;
  }

  get peaks() {
    return this.#peaks.subarray(0, this.columns);
  }

  get mels() {
    return this.#mels.subarray(0, this.columns * this.bands);
  }
}

function grown(values, length) {
  const larger = new Uint8Array(length);
  larger.set(values);
  return larger;
}

let count = 0;

/** A sound in the queue. Status: waiting, uploading, tagging, done, failed or cancelled. */
export class Clip {
  id = ++count;
  status = "waiting";
  sent = 0; // the part that is uploaded, 0 to 1
  length = null; // seconds, by the player or the file's header
  seconds = null; // how much was tagged, at the end
  head = {}; // the fields of the record besides its pieces, as the server sends them
  notes = []; // what is odd about the file
  error = "";
  scores = null;
  overview = null;
  #url = null;

  /**
   * @param {File | string} source a file, or the address of one that the server fetches
   * @param {{window: number, hop: number}} windows seconds
   */
  constructor(source, windows) {
    this.file = source instanceof Blob ? source : null;
    this.source = source;
    this.name = this.file ? this.file.name : nameOf(source);
    this.windows = windows;
  }

  /** An object URL for players, revoked by `release`; null if the page does not have the file. */
  get url() {
    if (this.file) this.#url ??= URL.createObjectURL(this.file);
    return this.#url;
  }

  release() {
    if (this.#url) URL.revokeObjectURL(this.#url);
    this.#url = null;
  }
}

/** The file name in an address; without one, the address. */
function nameOf(address) {
  try {
    return decodeURIComponent(new URL(address).pathname).split("/").pop() || address;
  } catch {
    return address; // not UTF-8, for example
  }
}

/** The record of a sound's events, as `ced tag --events -f jsonl` writes it. */
export function record(clip, model, events) {
  const pieces = events.map(({ onset, offset, index, peak }) => ({
    start: onset,
    end: offset,
    tags: [{ label: model.labels[index], index, mid: model.mids[index], prob: peak }],
  }));
  // What stands for a sound that was not tagged to its end, and has no head.
  const cut = { format: 1, file: clip.name, model: model.name, kind: "", seconds: clip.scores.scored, complete: false };
  // The server was asked for windows, and forms escape some characters of names.
  return { ...cut, ...clip.head, file: clip.name, kind: "events", pieces };
}
