/** Change the sampling rate of a stream: a band-limited interpolation with a windowed sinc. */

const CROSSINGS = 16; // zero crossings of the sinc on each side
const STEPS = 256; // of the table, between two crossings; values in between are interpolated

const TABLE = new Float32Array(CROSSINGS * STEPS + 2).map((_, place) => {
  const x = place / STEPS;
  if (x >= CROSSINGS) return 0;
  const hann = 0.5 + 0.5 * Math.cos((Math.PI * x) / CROSSINGS);
  return x ? (hann * Math.sin(Math.PI * x)) / (Math.PI * x) : 1;
});

/** Resamples block by block; the output lags by half the length of the filter. */
export class Resampler {
  #held; // samples that later outputs still need
  #next; // where in #held the next output lies

  /** @param {number} from Hz @param {number} to Hz */
  constructor(from, to) {
    this.step = from / to;
    this.cutoff = 0.95 * Math.min(1, to / from); // of the input's Nyquist frequency; the rest is the filter's slope
    this.reach = Math.ceil(CROSSINGS / this.cutoff);
    this.#held = new Float32Array(this.reach); // silence before the first sample
    this.#next = this.reach;
  }

  /** Resample the next samples. @param {Float32Array} samples */
  add(samples) {
    if (this.step === 1) return samples.slice();
    const held = new Float32Array(this.#held.length + samples.length);
    held.set(this.#held);
    held.set(samples, this.#held.length);
    const count = Math.max(0, Math.ceil((held.length - this.reach - this.#next) / this.step));
    const made = new Float32Array(count);
    for (let index = 0; index < count; index++) made[index] = this.#at(held, this.#next + index * this.step);
    const next = this.#next + count * this.step;
    const used = Math.max(0, Math.floor(next) - this.reach);
    this.#held = held.slice(used);
    this.#next = next - used;
    return made;
  }

  #at(held, place) {
    const first = Math.max(0, Math.ceil(place - this.reach));
    const last = Math.min(held.length - 1, Math.floor(place + this.reach));
    let sum = 0;
    for (let index = first; index <= last; index++) {
      const x = Math.abs(index - place) * this.cutoff * STEPS;
      const whole = Math.floor(x);
      if (whole >= CROSSINGS * STEPS) continue;
      sum += held[index] * (TABLE[whole] + (x - whole) * (TABLE[whole + 1] - TABLE[whole]));
    }
    return sum * this.cutoff;
  }
}
