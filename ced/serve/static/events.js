/** Merge scored windows into events, with the rules and the arithmetic of ced/tag/events.py. */

const SAME_INSTANT = 1e-6; // seconds; times that differ by less are equal up to rounding

/**
 * Merge the windows of a sound into events, by onset, then by class.
 *
 * A class's event begins with a window that reaches the threshold and continues through adjacent windows that stay at
 * or above `release` times the threshold. Where windows overlap, neighbours meet half-way through the overlap.
 *
 * @param {import("./state.js").Scores} scores
 * @param {{threshold: number, release?: number, gap?: number, shortest?: number, classes?: Iterable<number>}} options
 *   gap and shortest in seconds; classes: indices, all if left out.
 * @returns {{onset: number, offset: number, index: number, peak: number}[]} seconds; peak: the highest probability
 */
export function findEvents(scores, { threshold, release = 0.5, gap = 0, shortest = 0, classes }) {
  // Probabilities are float32, so thresholds are compared as float32.
  const high = Math.fround(threshold);
  const low = Math.fround(Math.fround(release) * high);
  const { begins, continues, lastOffsets } = boundaries(scores);
  const found = [];
  for (const index of classes ?? scores.labels.keys()) {
    if (scores.peaks[index] < high) continue;
    let onset = 0;
    let offset = 0;
    let peak = 0;
    let open = false; // an event that later windows may still belong to
    let going = false; // the last window belongs to it
    const close = () => {
      if (offset - onset >= shortest - SAME_INSTANT) found.push({ onset, offset, index, peak });
      open = going = false;
    };
    for (let window = 0; window < scores.length; window++) {
      if (going) offset = lastOffsets[window];
      if (open && offset < begins[window] - gap - SAME_INSTANT) close();
      const prob = scores.at(window, index);
      going = !scores.silent[window] && (prob >= high || (continues[window] && going && prob >= low));
      if (!going) continue;
      if (!open) {
        open = true;
        onset = begins[window];
        peak = 0;
      }
      offset = scores.ends[window];
      peak = Math.max(peak, prob);
    }
    if (open) close();
  }
  return found.sort((one, other) => one.onset - other.onset || one.index - other.index);
}

/** Start of the time that each window stands for, whether it adjoins the previous one, and end of the time of that one. */
function boundaries({ length, starts, ends }) {
  const begins = new Float64Array(length);
  const lastOffsets = new Float64Array(length);
  const continues = new Array(length).fill(false);
  for (let window = 0; window < length; window++) {
    begins[window] = starts[window];
    if (!window) continue;
    const last = ends[window - 1];
    const overlap = Math.max(0, last - starts[window]);
    lastOffsets[window] = last - overlap / 2;
    begins[window] = starts[window] + overlap / 2;
    continues[window] = starts[window] - last <= SAME_INSTANT;
  }
  return { begins, continues, lastOffsets };
}

/** Edges, in seconds, of the times that the windows stand for: length + 1 values. */
export function edges(scores) {
  const { begins } = boundaries(scores);
  const found = new Float64Array(scores.length + 1);
  found.set(begins);
  if (scores.length) found[scores.length] = scores.ends[scores.length - 1];
  return found;
}
