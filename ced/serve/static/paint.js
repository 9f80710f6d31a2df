/** Colours and the drawing of lanes: waveform overview, spectrogram, heat map and time axis. */

import { edges } from "./events.js";
import { clock, tickStep } from "./time.js";

// Colour scales from 0 to 1. Sound is drawn in the neutral colour of the theme; the accent is kept for tags.
const SCALES = {
  light: {
    sound: ["#ffffff", "#e4e7eb", "#9aa5b1", "#3e4c59", "#10161d"],
    heat: ["#f4f6f8", "#cfe3f5", "#7db8e8", "#2477bd", "#0a3761"],
  },
  dark: {
    sound: ["#14171a", "#23282e", "#545f6b", "#a3afbb", "#f5f7fa"],
    heat: ["#1c2126", "#17395a", "#1f6fb0", "#58b0f0", "#d8efff"],
  },
};

/** Colours of lines and marks. */
export const INKS = {
  light: { wave: "#7b8794", played: "#3e4c59", cursor: "#c2410c", accent: "#1769b0", axis: "#57616c", veil: "#52606d40" },
  dark: { wave: "#7b8794", played: "#cbd2d9", cursor: "#fb923c", accent: "#58b0f0", axis: "#a3afbb", veil: "#00000080" },
};

const SHOWN = 175; // steps of 0.4 dB: the range of 70 dB below the loudest

/** A table of 256 colours, four bytes each. */
function table(stops) {
  const colours = stops.map((stop) => [1, 3, 5].map((place) => parseInt(stop.slice(place, place + 2), 16)));
  const made = new Uint8ClampedArray(1024);
  for (let value = 0; value < 256; value++) {
    const place = (value / 255) * (stops.length - 1);
    const lower = Math.min(stops.length - 2, Math.floor(place));
    const part = place - lower;
    for (let channel = 0; channel < 3; channel++)
      made[4 * value + channel] = colours[lower][channel] * (1 - part) + colours[lower + 1][channel] * part;
    made[4 * value + 3] = 255;
  }
  return made;
}

const TABLES = Object.fromEntries(
  Object.entries(SCALES).map(([theme, { sound, heat }]) => [theme, { sound: table(sound), heat: table(heat) }]),
);

/** Draw values (height, width), 0 to 255, over a part of a canvas; negative values are transparent. */
function picture(context, values, width, height, colours, { x = 0, y = 0, tall, wide = width, smooth = false }) {
  const image = new ImageData(width, height);
  for (let place = 0; place < values.length; place++)
    if (values[place] >= 0) image.data.set(colours.subarray(4 * values[place], 4 * values[place] + 4), 4 * place);
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = smooth;
  context.drawImage(canvas, x, y, wide, tall);
}

/**
 * Draw the log-mel spectrogram of the piece `from` to `to` (seconds), low frequencies at the bottom.
 *
 * @param {CanvasRenderingContext2D} context
 * @param {import("./state.js").Overview} overview
 */
export function drawSpectrogram(context, overview, { from, to, width, height, theme }) {
  const { bands, rate, columns, mels, loudest } = overview;
  // As many columns as there are pixels at most; where several share one, the loudest counts.
  const step = Math.max(1, Math.floor(((to - from) * rate) / width));
  const first = Math.max(0, Math.floor((from * rate) / step) * step);
  const count = Math.min(columns, Math.ceil(to * rate)) - first;
  if (count <= 0) return;
  const drawn = Math.ceil(count / step);
  const quietest = Math.max(0, loudest - SHOWN);
  const values = new Int16Array(drawn * bands);
  for (let column = 0; column < count; column++) {
    const at = Math.floor(column / step);
    for (let band = 0; band < bands; band++) {
      const place = (bands - 1 - band) * drawn + at;
      const part = (mels[(first + column) * bands + band] - quietest) / (loudest - quietest || 1);
      values[place] = Math.max(values[place], Math.round(255 * part));
    }
  }
  const scale = width / (to - from);
  const x = (first / rate - from) * scale;
  const wide = ((drawn * step) / rate) * scale;
  picture(context, values, drawn, bands, TABLES[theme].sound, { x, tall: height, wide, smooth: true });
}

/**
 * Draw the probabilities of some classes as rows of colour; where several windows share a pixel, the highest counts.
 *
 * @param {CanvasRenderingContext2D} context
 * @param {import("./state.js").Scores} scores
 * @param {number[]} rows indices of classes
 */
export function drawHeat(context, scores, rows, { from, to, width, rowHeight, theme }) {
  if (!scores.length || !rows.length) return;
  const times = edges(scores);
  const values = new Int16Array(width * rows.length).fill(-1);
  let window = before(times, from);
  for (let x = 0; x < width; x++) {
    const [begin, end] = [x, x + 1].map((place) => from + (place / width) * (to - from));
    if (begin >= times[scores.length]) break;
    while (window < scores.length - 1 && times[window + 1] <= begin) window++;
    for (let last = window; last < scores.length && (last === window || times[last] < end); last++)
      rows.forEach((index, row) => {
        const place = row * width + x;
        values[place] = Math.max(values[place], Math.round(255 * scores.at(last, index)));
      });
  }
  rows.forEach((_, row) => {
    const part = values.subarray(row * width, (row + 1) * width);
    picture(context, part, width, 1, TABLES[theme].heat, { y: row * rowHeight + 1, tall: rowHeight - 2 });
  });
}

/** The last place whose value is not above `value`, at least 0. */
function before(values, value) {
  let low = 0;
  let high = values.length - 1;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (values[middle] <= value) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** Draw the ticks of a time axis, with times where there is room. */
export function drawAxis(context, { from, to, width, height, ink }) {
  const scale = width / (to - from);
  const step = tickStep(72 / scale);
  context.font = "11px system-ui, sans-serif";
  context.fillStyle = context.strokeStyle = ink;
  context.textBaseline = "middle";
  const decimals = step < 0.1 ? 2 : step < 1 ? 1 : 0;
  for (let tick = Math.floor(from / step) - 1; tick * step < to; tick++) {
    if (tick < 0) continue;
    const x = Math.round((tick * step - from) * scale);
    context.fillRect(x, 0, 1, 5);
    context.fillText(clock(tick * step, decimals), x + 4, height / 2 + 1);
  }
}

/** Draw the whole sound in small: its peaks, the events as marks, and a frame around the visible part. */
export function drawMap(context, { overview, events, seconds, range, width, height, colours }) {
  context.clearRect(0, 0, width, height);
  const scale = width / seconds;
  if (overview) {
    context.fillStyle = colours.wave;
    for (let x = 0; x < width; x++) {
      const [first, last] = [x, x + 1].map((place) => Math.floor((place / scale) * overview.rate));
      let peak = 0;
      for (let column = first; column < Math.max(last, first + 1) && column < overview.columns; column++)
        peak = Math.max(peak, overview.peaks[column]);
      const tall = Math.max(1, (peak / 255) * (height - 6));
      if (first < overview.columns) context.fillRect(x, (height - 4 - tall) / 2, 1, tall);
    }
  }
  context.fillStyle = colours.accent;
  for (const { onset, offset } of events)
    context.fillRect(onset * scale, height - 3, Math.max(1, (offset - onset) * scale), 3);
  context.fillStyle = colours.veil;
  context.fillRect(0, 0, range[0] * scale, height);
  context.fillRect(range[1] * scale, 0, width - range[1] * scale, height);
}
