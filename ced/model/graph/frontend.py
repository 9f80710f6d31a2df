"""The log-mel front end as ONNX nodes: a Fourier transform as four small matrix products.

ONNX's own STFT operator is several times slower. A frame x of N samples under a window w, which is symmetric about N/2,
has the spectrum sum over n of w[n] x[n] exp(-2 pi i k n / N). Its cosines are even about N/2, its sines odd, so

    E[n] = w[n] (x[n] + x[N - n]),    O[n] = w[n] (x[n] - x[N - n]),    0 <= n <= N/2

are all that they meet; and about N/4 each of both is even or odd again, by the parity of the bin k:

    k even: cosines meet E[n] + E[N/2 - n], sines O[n] - O[N/2 - n],    0 <= n <= N/4
    k odd:  cosines meet E[n] - E[N/2 - n], sines O[n] + O[N/2 - n]

which leaves a quarter of the products. The window is 0 at n = 0, so x[N] does not matter.
"""

import math

import numpy as np
from numpy.typing import NDArray

from ced.errors import ExportError
from ced.model.graph.builder import Nodes
from ced.sound.features import POWER_FLOOR, TOP_DB, FrontEnd, hann_window, mel_filters


def log_mel(nodes: Nodes, settings: FrontEnd, waves: str) -> str:
    """Add the front end, (b, t) -> (b, n, f) dB; waves shorter than one patch are padded with zeros.

    Raises:
        ExportError: the front end is not centred, or its window is not symmetric.
    """
    near, far = _windows(settings)
    here, there = _frames(nodes, settings, waves)
    even = nodes.add("Mul", nodes.add("Add", here, there), nodes.weight("mel.even", np.stack([near, far])[:, None]))
    odd = nodes.add("Mul", nodes.add("Sub", here, there), nodes.weight("mel.odd", np.stack([near, -far])[:, None]))
    (even_near, even_far), (odd_near, odd_far) = nodes.split(even, 1, 2), nodes.split(odd, 1, 2)
    mel = nodes.add(
        "Add",
        _bins(nodes, settings, 0, nodes.add("Add", even_near, even_far), nodes.add("Sub", odd_near, odd_far)),
        _bins(nodes, settings, 1, nodes.add("Sub", even_near, even_far), nodes.add("Add", odd_near, odd_far)),
    )
    mel = nodes.add("Log", nodes.add("Max", nodes.add("Squeeze", mel, nodes.ints(1)), nodes.number(POWER_FLOOR)))
    decibels = nodes.add("Mul", mel, nodes.number(10.0 / math.log(10.0)))
    loudest = nodes.add("ReduceMax", decibels, nodes.ints(1, 2), keepdims=1)
    return nodes.add("Max", decibels, nodes.add("Sub", loudest, nodes.number(TOP_DB)))


def _frames(nodes: Nodes, settings: FrontEnd, waves: str) -> tuple[str, str]:
    """Cut x[n] and x[N - n] out of each frame, both (b, 2, n, w): n from 0 and from N/2, N/4 + 1 samples or more of it.

    Frames are cut from whole blocks of samples, which is faster than sample by sample; x[N - n] comes from the mirrored
    wave, whose frames are those of the wave in reverse order.
    """
    n_fft, hop = settings.n_fft, settings.hop_size
    missing = nodes.add("Max", nodes.add("Sub", nodes.ints(settings.min_samples), nodes.size(waves, 1)), nodes.ints(0))
    waves = nodes.add("Pad", waves, nodes.joined(0, 0, 0, missing))
    hops = nodes.add("Div", nodes.size(waves, 1), nodes.ints(hop))
    stop = nodes.add("Add", nodes.add("Mul", hops, nodes.ints(hop)), nodes.ints(n_fft))
    waves = nodes.add("Pad", waves, nodes.ints(0, n_fft // 2, 0, n_fft // 2 + 1), mode="reflect")

    block = math.gcd(hop, n_fft // 4)
    forwards = nodes.add("Slice", waves, nodes.ints(0), stop, nodes.ints(1))
    backwards = nodes.add("Slice", waves, stop, nodes.ints(0), nodes.ints(1), nodes.ints(-1))
    count = nodes.add("Squeeze", nodes.add("Add", hops, nodes.ints(1)))
    order = nodes.add("Range", nodes.indices(np.int64(0)), count, nodes.indices(np.int64(1)))
    starts = nodes.add("Unsqueeze", nodes.add("Mul", order, nodes.ints(hop // block)), nodes.ints(1))  # (n, 1) blocks
    mirrored = nodes.add("Sub", nodes.add("Mul", hops, nodes.ints(hop // block)), starts)
    quarter = n_fft // 4 // block
    within = nodes.indices(np.array([[0], [2 * quarter]])[..., None] + np.arange(quarter + 1))  # (2, 1, blocks)

    def cut(samples: str, firsts: str) -> str:
        blocks = nodes.add("Gather", nodes.reshape(samples, 0, -1, block), nodes.add("Add", firsts, within), axis=1)
        return nodes.reshape(blocks, 0, 2, -1, (quarter + 1) * block)

    return cut(forwards, starts), cut(backwards, mirrored)


def _width(settings: FrontEnd) -> int:
    """Return the samples that `_frames` cuts of a quarter: one more than the quarter, in whole blocks."""
    return settings.n_fft // 4 + math.gcd(settings.hop_size, settings.n_fft // 4)


def _windows(settings: FrontEnd) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return w[n] and w[N/2 - n] for 0 <= n <= N/4, zeros behind.

    What pairs with itself, N/2 in the first fold and N/4 in the second, would be counted twice: its window is halved.
    """
    n_fft = settings.n_fft
    window = np.zeros(n_fft)
    begin = (n_fft - settings.win_size) // 2
    window[begin : begin + settings.win_size] = hann_window(settings.win_size)
    if not settings.center or n_fft % 4 or window[0] or not np.allclose(window[1:], window[:0:-1], atol=1e-7):
        raise ExportError("only a centred front end with a symmetric window and n_fft a multiple of 4 can be exported")
    quarter = n_fft // 4
    near, far = np.zeros(_width(settings)), np.zeros(_width(settings))
    near[: quarter + 1] = window[: quarter + 1]
    far[: quarter + 1] = window[n_fft // 2 : quarter - 1 : -1]
    far[0] /= 2
    near[quarter] /= 2
    far[quarter] /= 2
    return near, far


def _bins(nodes: Nodes, settings: FrontEnd, parity: int, cosines: str, sines: str) -> str:
    """Add what the even or the odd bins contribute to the mel bands, from what their waves meet: -> (b, 1, n, f)."""
    n_fft = settings.n_fft
    filters = mel_filters(settings).astype(np.float64)  # (f, bins)
    bins = np.arange(parity, n_fft // 2 + 1, 2)
    bins = bins[filters[:, bins].any(0)]
    places = np.arange(_width(settings))[:, None]
    angles = 2.0 * np.pi * (places * bins % n_fft) / n_fft
    real = nodes.add("MatMul", cosines, nodes.weight(f"mel.cosines{parity}", np.cos(angles)))
    imaginary = nodes.add("MatMul", sines, nodes.weight(f"mel.sines{parity}", np.sin(angles)))
    power = nodes.add("Add", nodes.add("Mul", real, real), nodes.add("Mul", imaginary, imaginary))
    return nodes.add("MatMul", power, nodes.weight(f"mel.filters{parity}", filters[:, bins].T))
