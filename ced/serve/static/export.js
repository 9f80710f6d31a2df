/** Write records as files, as `ced tag --events -f FORMAT` prints them. */

const HIGHEST = 8000; // Hz; the upper edge of the mel filters
const SECONDS = ["seconds", "expected_seconds"]; // fields of a record that are never written as integers
const TAIL = ["seconds", "complete", "expected_seconds"]; // fields of a record after its pieces
const RAVEN_COLUMNS = [
  "Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)", "High Freq (Hz)", "Begin Path",
  "File Offset (s)", "Label", "Score",
]; // prettier-ignore

/** Formats by name: suffix, media type, writer of records, and whether several sounds can share a file. */
export const FORMATS = {
  csv: { name: "CSV", suffix: ".csv", type: "text/csv", lines: csv, shared: true },
  jsonl: { name: "JSONL", suffix: ".jsonl", type: "application/jsonl", lines: jsonl, shared: true },
  audacity: { name: "Audacity", suffix: ".labels.txt", type: "text/plain", lines: audacity },
  raven: { name: "Raven", suffix: ".selections.txt", type: "text/plain", lines: raven, shared: true },
};

/** The text of a file with records in a format. */
export function text(format, records) {
  return FORMATS[format].lines(records).map((line) => `${line}\n`).join("");
}

function csv(records) {
  const lines = rows(records).map(({ record, piece, tag }) =>
    [record.file, fixed(piece.start, 6), fixed(piece.end, 6), tag.label, tag.mid ?? "", fixed(tag.prob, 6)]
      .map(quoted)
      .join(","),
  );
  return ["file,start,end,label,mid,prob", ...lines];
}

function jsonl(records) {
  return records.map(({ pieces, ...head }) => {
    const parts = pieces.map(({ start, end, tags }) => {
      const each = tags.map(
        ({ label, index, mid, prob }) =>
          `{"label": ${json(label)}, "index": ${index}, "mid": ${json(mid)}, "prob": ${float(prob)}}`,
      );
      return `{"start": ${float(start)}, "end": ${float(end)}, "tags": [${each.join(", ")}]}`;
    });
    const described = (behind) =>
      Object.entries(head)
        .filter(([name]) => TAIL.includes(name) === behind)
        .map(([name, value]) => `"${name}": ${SECONDS.includes(name) && value !== null ? float(value) : json(value)}`);
    return `{${[...described(false), `"pieces": [${parts.join(", ")}]`, ...described(true)].join(", ")}}`;
  });
}

function audacity(records) {
  return rows(records).map(
    ({ piece, tag }) => `${fixed(piece.start, 6)}\t${fixed(piece.end, 6)}\t${cell(tag.label)} ${fixed(tag.prob, 2)}`,
  );
}

function raven(records) {
  const lines = [RAVEN_COLUMNS.join("\t")];
  let before = 0; // Raven opens several sounds as one sequence
  for (const record of records) {
    const highest = Math.min(HIGHEST, record.rate ? record.rate / 2 : HIGHEST);
    for (const { piece, tag } of rows([record])) {
      const times = [before + piece.start, before + piece.end].map((time) => fixed(time, 6));
      const frequencies = ["0.0", highest.toFixed(1)];
      const place = [cell(record.file), fixed(piece.start, 6)];
      const found = [cell(tag.label), fixed(tag.prob, 6)];
      lines.push([lines.length, "Spectrogram 1", "1", ...times, ...frequencies, ...place, ...found].join("\t"));
    }
    before += record.seconds;
  }
  return lines;
}

function rows(records) {
  return records.flatMap((record) =>
    record.pieces.flatMap((piece) => piece.tags.map((tag) => ({ record, piece, tag }))),
  );
}

function quoted(field) {
  return /[",\r\n]/.test(field) ? `"${field.replaceAll('"', '""')}"` : field;
}

// Controls, line and paragraph separators, lone surrogates, and invisible or bidirectional format characters.
const UNSAFE =
  /[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}\ud800-\udfff]/gu;

/** A value as JSON that is safe to print: unsafe characters are escaped. */
function json(value) {
  const escape = (found) => found.split("").map((unit) => unicode(unit.charCodeAt(0))).join(""); // UTF-16 units
  return JSON.stringify(value).replace(UNSAFE, escape);
}

/** Text that fits into a cell of a table without quoting: tabs, line breaks and controls become escapes. */
function cell(words) {
  const short = { "\t": "\\t", "\n": "\\n", "\r": "\\r" };
  return words.replace(/[\x00-\x1f\x7f-\x9f\u2028\u2029]/g, (found) => {
    const code = found.charCodeAt(0);
    return short[found] ?? (code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : unicode(code));
  });
}

function unicode(code) {
  return `\\u${code.toString(16).padStart(4, "0")}`;
}

/** A number with a fixed count of decimals, halves rounded to even as Python does. */
export function fixed(value, decimals) {
  const halves = value * 2 ** (decimals + 1);
  if (!Number.isInteger(halves) || halves % 2 === 0) return value.toFixed(decimals);
  const below = Math.floor(value * 10 ** decimals); // exactly half-way between this and the next
  return ((below % 2 ? below + 1 : below) / 10 ** decimals).toFixed(decimals);
}

/** A number as Python's json writes it: the shortest digits that give the same value, with a point or an exponent. */
export function float(value) {
  const magnitude = Math.abs(value);
  if (magnitude !== 0 && (magnitude < 1e-4 || magnitude >= 1e16)) {
    const [digits, exponent] = value.toExponential().split("e");
    return `${digits}e${exponent[0]}${exponent.slice(1).padStart(2, "0")}`;
  }
  return Number.isInteger(value) ? `${value}.0` : `${value}`;
}
