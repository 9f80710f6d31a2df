/** Runs in the audio thread: sends the signal of the microphone to the page, mono, at a chosen rate. */

import { Resampler } from "./resample.js";

const BLOCK = 0.1; // seconds in a message

class Capture extends AudioWorkletProcessor {
  #parts = [];
  #count = 0;

  constructor({ processorOptions: { rate } }) {
    super();
    this.resampler = new Resampler(sampleRate, rate);
    this.size = Math.round(BLOCK * rate);
  }

  process([channels]) {
    if (channels.length) {
      const mono = channels[0].slice();
      for (const other of channels.slice(1)) other.forEach((sample, index) => (mono[index] += sample));
      if (channels.length > 1) mono.forEach((_, index) => (mono[index] /= channels.length));
      const made = this.resampler.add(mono);
      this.#parts.push(made);
      this.#count += made.length;
      if (this.#count >= this.size) this.#send();
    }
    return true;
  }

  #send() {
    const block = new Float32Array(this.#count);
    let place = 0;
    for (const part of this.#parts) {
      block.set(part, place);
      place += part.length;
    }
    this.#parts = [];
    this.#count = 0;
    this.port.postMessage(block, [block.buffer]);
  }
}

registerProcessor("capture", Capture);
