"""The grid on which models hear: samples to frames, frames to patches. It needs no torch."""

from ced.sound.audio import SAMPLE_RATE

HOP = 160  # samples from one frame to the next
PATCH = 16  # frames and mel bins a patch is wide and high; patches do not overlap
MIN_SAMPLES = (PATCH - 1) * HOP  # 2,400: the shortest wave with one column of patches
HOP_SECONDS = HOP / SAMPLE_RATE
