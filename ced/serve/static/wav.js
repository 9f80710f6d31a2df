/** WAV files: write one, and cut a piece out of a sound. */

const PLAIN = new Set([1, 3, 0xfffe]); // PCM, float, and both with an extended header
const LONGEST_FORMAT = 4096; // bytes of a "fmt " chunk; usual ones have 16 to 40
const MOST_CHUNKS = 10_000; // that are looked at
const DECODED_RATE = 48_000;
const LONGEST = 20 * 60; // seconds of a compressed sound that is decoded as a whole

/** A mono 16-bit WAV file. @param {Int16Array[]} parts @param {number} rate Hz */
export function wav(parts, rate) {
  const bytes = parts.reduce((sum, part) => sum + part.byteLength, 0);
  return new Blob([header(format(1, 1, rate, 16), bytes), ...parts], { type: "audio/wav" });
}

/**
 * Cut a piece out of a sound, as a WAV file: the samples of a WAV file as they are, other files decoded.
 *
 * @param {Blob} file @param {number} start seconds @param {number} end seconds @param {number} seconds its length
 * @throws {Error} with a message for users, if the browser cannot decode the file
 */
export async function snippet(file, start, end, seconds) {
  const found = await parse(file);
  if (found) {
    const [from, to] = [start, end].map((time) => found.offset + Math.round(time * found.rate) * found.frame);
    const samples = file.slice(from, Math.min(to, found.offset + found.bytes));
    return new Blob([header(found.format, samples.size), samples], { type: "audio/wav" });
  }
  if (seconds > LONGEST)
    throw new Error(`Pieces of compressed sounds longer than ${LONGEST / 60} min cannot be saved here; WAV files can.`);
  const sound = await decode(file);
  const [from, to] = [start, end].map((time) => Math.round(time * DECODED_RATE));
  const channels = Array.from({ length: sound.numberOfChannels }, (_, index) => sound.getChannelData(index));
  const length = Math.max(0, Math.min(to, sound.length) - from);
  const samples = new Int16Array(length * channels.length);
  channels.forEach((channel, index) => {
    for (let place = 0; place < length; place++)
      samples[place * channels.length + index] = Math.max(-32768, Math.min(32767, Math.round(channel[from + place] * 32768)));
  });
  const described = format(1, channels.length, DECODED_RATE, 16);
  return new Blob([header(described, samples.byteLength), samples], { type: "audio/wav" });
}

async function decode(file) {
  const context = new OfflineAudioContext(1, 1, DECODED_RATE);
  try {
    return await context.decodeAudioData(await file.arrayBuffer());
  } catch {
    throw new Error("This browser cannot decode the file, so no piece of it can be saved here.");
  }
}

/**
 * Find the format and the samples of a WAV file; null if it is not one, or is compressed.
 *
 * Only the headers of chunks are read, because other chunks, such as text and pictures, may be long.
 */
async function parse(file) {
  const read = async (place, size) => new DataView(await file.slice(place, place + size).arrayBuffer());
  const name = (view, place) => String.fromCharCode(...new Uint8Array(view.buffer, place, 4));
  const start = await read(0, 12);
  if (start.byteLength < 12 || !["RIFF", "RF64"].includes(name(start, 0)) || name(start, 8) !== "WAVE") return null;
  let described = null;
  for (let place = 12, count = 0; place + 8 <= file.size && count < MOST_CHUNKS; count++) {
    const chunk = await read(place, 8);
    const size = chunk.getUint32(4, true);
    const offset = place + 8;
    if (name(chunk, 0) === "fmt " && size <= LONGEST_FORMAT) described = await read(offset, size);
    if (name(chunk, 0) === "data") {
      if (!described || described.byteLength < 16) return null;
      const frame = described.getUint16(12, true);
      if (!PLAIN.has(described.getUint16(0, true)) || !frame) return null;
      const bytes = Math.min(size, file.size - offset); // RF64 and streams say 0xffffffff
      return { format: new Uint8Array(described.buffer), rate: described.getUint32(4, true), frame, offset, bytes };
    }
    place = offset + size + (size % 2);
  }
  return null;
}

/** The fields of a "fmt " chunk. */
function format(tag, channels, rate, bits) {
  const fields = new DataView(new ArrayBuffer(16));
  const frame = (channels * bits) / 8;
  [tag, channels].forEach((value, index) => fields.setUint16(2 * index, value, true));
  fields.setUint32(4, rate, true);
  fields.setUint32(8, rate * frame, true);
  fields.setUint16(12, frame, true);
  fields.setUint16(14, bits, true);
  return new Uint8Array(fields.buffer);
}

/** The header of a WAV file. */
function header(described, bytes) {
  const made = new DataView(new ArrayBuffer(28 + described.length));
  const write = (place, words) => [...words].forEach((letter, index) => made.setUint8(place + index, letter.charCodeAt(0)));
  write(0, "RIFF");
  made.setUint32(4, made.byteLength - 8 + bytes, true);
  write(8, "WAVEfmt ");
  made.setUint32(16, described.length, true);
  new Uint8Array(made.buffer).set(described, 20);
  write(20 + described.length, "data");
  made.setUint32(24 + described.length, bytes, true);
  return made.buffer;
}
