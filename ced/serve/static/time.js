/** Times as text. */

/** Seconds as 12.34, 1:02.3 or 1:00:02.3. */
export function clock(seconds, decimals = 1) {
  const sign = seconds < 0 ? "-" : "";
  const scale = 10 ** decimals;
  let rest = Math.round(Math.abs(seconds) * scale);
  const hours = Math.floor(rest / (3600 * scale));
  rest -= hours * 3600 * scale;
  const minutes = Math.floor(rest / (60 * scale));
  rest -= minutes * 60 * scale;
  const width = decimals ? decimals + 3 : 2;
  const padded = (rest / scale).toFixed(decimals).padStart(width, "0");
  return `${sign}${hours ? `${hours}:${String(minutes).padStart(2, "0")}` : minutes}:${padded}`;
}

const STEPS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200];

/** The interval of the ticks of an axis: the shortest round one of at least `least` seconds. */
export function tickStep(least) {
  return STEPS.find((step) => step >= least) ?? Math.ceil(least / 3600) * 3600;
}
