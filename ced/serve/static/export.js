/** Write records as files, byte for byte as `ced tag --events -f FORMAT` prints them. */

const FORMAT_VERSION = 1;
const HIGHEST = 8000; // Hz
const RAVEN_COLUMNS = [
  "Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)", "High Freq (Hz)", "Begin Path",
  "File Offset (s)", "Label", "Score",
]; // prettier-ignore

/** Formats by name: suffix and media type of their files, what makes lines of records, and whether sounds can share one. */
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
  return records.map(({ file, model, seconds, pieces, kind }) => {
    const parts = pieces.map(({ start, end, tags }) => {
      const each = tags.map(
        ({ label, index, mid, prob }) =>
          `{"label": ${JSON.stringify(label)}, "index": ${index}, "mid": ${JSON.stringify(mid)}, "prob": ${float(prob)}}`,
      );
      return `{"start": ${float(start)}, "end": ${float(end)}, "tags": [${each.join(", ")}]}`;
    });
    const head = `"format": ${FORMAT_VERSION}, "file": ${JSON.stringify(file)}, "model": ${JSON.stringify(model)}`;
    return `{${head}, "seconds": ${float(seconds)}, "pieces": [${parts.join(", ")}], "kind": "${kind}"}`;
  });
}

function audacity(records) {
  return rows(records).map(
    ({ piece, tag }) => `${fixed(piece.start, 6)}\t${fixed(piece.end, 6)}\t${plain(tag.label)} ${fixed(tag.prob, 2)}`,
  );
}

function raven(records) {
  const lines = [RAVEN_COLUMNS.join("\t")];
  let before = 0; // Raven opens several sounds as one sequence
  for (const record of records) {
    for (const { piece, tag } of rows([record])) {
      const times = [before + piece.start, before + piece.end].map((time) => fixed(time, 6));
      const frequencies = ["0.0", HIGHEST.toFixed(1)];
      const place = [plain(record.file), fixed(piece.start, 6)];
      const found = [plain(tag.label), fixed(tag.prob, 6)];
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

/** Replace what would break a line or a column. */
function plain(words) {
  return words.replace(/[\x00-\x1f\x7f\x85\u2028\u2029]/g, " ");
}

/** A number with a fixed count of decimals, halves rounded to even as Python does. */
export function fixed(value, decimals) {
  const halves = value * 2 ** (decimals + 1);
  if (!Number.isInteger(halves) || halves % 2 === 0) return value.toFixed(decimals);
  const below = Math.floor(value * 10 ** decimals); // exactly half-way between this and the next
  return ((below % 2 ? below + 1 : below) / 10 ** decimals).toFixed(decimals);
}

/** A number as Python's JSON has it: the shortest digits that read back the same, always with a point or exponent. */
export function float(value) {
  const magnitude = Math.abs(value);
  if (magnitude !== 0 && (magnitude < 1e-4 || magnitude >= 1e16)) {
    const [digits, exponent] = value.toExponential().split("e");
    return `${digits}e${exponent[0]}${exponent.slice(1).padStart(2, "0")}`;
  }
  return Number.isInteger(value) ? `${value}.0` : `${value}`;
}
