/** The microphone as blocks of samples. */

import { wav } from "./wav.js";

/**
 * Open the microphone and pass blocks of about 0.1 s to `onBlock`, mono Float32Array.
 *
 * Automatic gain, echo cancellation and noise suppression are off: they are made for speech and remove other sounds.
 *
 * @param {number | null} rate Hz; null: the device's own
 * @param {(block: Float32Array) => void} onBlock
 * @param {(error: Error) => void} onLost called when the device is disconnected
 * @returns {Promise<{rate: number, close: () => void}>}
 * @throws {Error} with a message for users, if there is no microphone or no permission
 */
export async function openMicrophone(rate, onBlock, onLost) {
  if (!navigator.mediaDevices || !window.AudioWorkletNode)
    throw new Error("The browser offers the microphone only on https:// and localhost addresses.");
  const wanted = { autoGainControl: false, echoCancellation: false, noiseSuppression: false };
  const stream = await navigator.mediaDevices.getUserMedia({ audio: wanted }).catch((error) => {
    throw new Error(REASONS[error.name] ?? `The microphone cannot be opened: ${error.message}`);
  });
  const context = new AudioContext();
  const close = () => {
    stream.getTracks().forEach((track) => track.stop());
    if (context.state !== "closed") context.close();
  };
  try {
    await context.audioWorklet.addModule(new URL("worklet.js", import.meta.url));
    await context.resume();
    const chosen = rate ?? context.sampleRate;
    const capture = new AudioWorkletNode(context, "capture", {
      numberOfOutputs: 0,
      processorOptions: { rate: chosen },
    });
    capture.port.onmessage = ({ data }) => onBlock(data);
    context.createMediaStreamSource(stream).connect(capture);
    stream.getAudioTracks()[0].onended = () => {
      close();
      onLost(new Error("The microphone was disconnected."));
    };
    return { rate: chosen, close };
  } catch (error) {
    close();
    throw error;
  }
}

const REASONS = {
  NotAllowedError: "The browser did not give permission to use the microphone.",
  NotFoundError: "There is no microphone.",
  NotReadableError: "The microphone is in use by another program.",
};

/** Records the microphone, at the device's own rate, until `stop`. */
export class Recorder {
  #blocks = [];
  #microphone;

  /** @param {(seconds: number, level: number) => void} onBlock the length so far, and the level in dBFS */
  async start(onBlock, onLost) {
    let count = 0;
    this.#microphone = await openMicrophone(
      null,
      (block) => {
        this.#blocks.push(block);
        count += block.length;
        onBlock(count / this.#microphone.rate, level(block));
      },
      onLost,
    );
  }

  /** End the recording and return it as a WAV file. */
  stop() {
    this.#microphone.close();
    const now = new Date();
    const local = new Date(now - now.getTimezoneOffset() * 60_000).toISOString();
    const name = `recording ${local.slice(0, 19).replace("T", " ").replaceAll(":", ".")}.wav`;
    return new File([wav(this.#blocks.map(pcm16), this.#microphone.rate)], name, { type: "audio/wav" });
  }
}

/** Samples in [-1, 1] as 16-bit integers. */
export function pcm16(block) {
  return Int16Array.from(block, (sample) => Math.max(-32768, Math.min(32767, Math.round(sample * 32768))));
}

/** The level of a block in dBFS, root mean square. */
export function level(block) {
  let power = 0;
  for (const sample of block) power += sample * sample;
  return 10 * Math.log10(power / block.length || 1e-12);
}
