"""A network as an ONNX graph, made from weights and optimised for ONNX Runtime on a CPU.

It computes the same as `vit.CED` and is written node by node, not traced, to avoid superfluous nodes: frames come
before mel bins, patches are one matrix product, attention is one node. Tests compare the two.
"""

import math
from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ced.errors import CheckpointError, ExportError
from ced.model.config import ModelConfig
from ced.model.graph import COLUMNS, EMBEDDING, PROB
from ced.model.graph.builder import Nodes
from ced.model.weights import Array, Weights, configured
from ced.sound.features import PATCH, POWER_FLOOR, TOP_DB, FrontEnd, hann_window, mel_filters

Shape = list[str | int]
RUNTIME = "com.microsoft"  # the domain of ONNX Runtime's own operators
BLOCKS = "blocks."  # how the names of the weights of the blocks begin, as published; int8 graphs quantise these
BLOCK_EPSILON = 1e-6  # of the LayerNorms in and after the blocks
NORM_EPSILON = 1e-5  # of the BatchNorm and of the LayerNorm in the output layer


def wave_graph(weights: Weights) -> onnx.ModelProto:
    """Return a graph from `waves` (b, t) to `prob` (b, c), `embedding` (b, d) and `columns` (b, columns, c).

    It uses operators of ONNX Runtime's own.

    Raises:
        CheckpointError: the weights do not fit their configuration.
        ExportError: the front end is not centred, or its window is not symmetric.
    """
    nodes, (config, arrays) = Nodes(), configured(weights)
    mel = _log_mel(nodes, config.front_end, "waves")
    network = _Network(nodes, config, arrays, fused=True)
    tokens, pieces = network.tokens(mel)
    results: dict[str, tuple[str, Shape]] = {
        PROB: (network.probabilities(tokens, pieces), ["batch", config.outputdim]),
        EMBEDDING: (network.embedding(tokens, pieces), ["batch", config.embed_dim]),
        COLUMNS: (network.columns(tokens, pieces, mel), ["batch", "columns", config.outputdim]),
    }
    return _model(nodes.graph(("waves", ["batch", "time"]), results), opset=20)


def feats_graph(weights: Weights) -> onnx.ModelProto:
    """Return a graph from `feats` (b, f, n) dB to `prob` (b, c), with standard ONNX operators only.

    Raises:
        CheckpointError: the weights do not fit their configuration, or have no output layer.
    """
    if not weights.has_head:
        raise CheckpointError(
            f"{weights.source} has no output layer (masked pre-training leaves none): nothing to score"
        )
    nodes, (config, arrays) = Nodes(), configured(weights)
    network = _Network(nodes, config, arrays, fused=False)
    tokens, pieces = network.tokens(nodes.add("Transpose", "feats", perm=[0, 2, 1]))
    results: dict[str, tuple[str, Shape]] = {PROB: (network.probabilities(tokens, pieces), ["batch", config.outputdim])}
    return _model(nodes.graph(("feats", ["batch", config.n_mels, "time"]), results), opset=18)


def front_end_graph(settings: FrontEnd) -> onnx.ModelProto:
    """Return a graph from `waves` (b, t) to `feats` (b, f, n) dB."""
    nodes = Nodes()
    feats = nodes.add("Transpose", _log_mel(nodes, settings, "waves"), perm=[0, 2, 1])
    results: dict[str, tuple[str, Shape]] = {"feats": (feats, ["batch", settings.n_mels, "frames"])}
    return _model(nodes.graph(("waves", ["batch", "time"]), results), opset=18)


def _model(graph: onnx.GraphProto, opset: int) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", opset)]
    if any(node.domain == RUNTIME for node in graph.node):
        opsets.append(helper.make_opsetid(RUNTIME, 1))
    # The IR version that introduced the operators: older runtimes refuse a later one.
    return helper.make_model(graph, opset_imports=opsets, ir_version=8 if opset < 20 else 9)


class _Network:
    """Adds the parts of `vit.CED` to a graph."""

    def __init__(self, nodes: Nodes, config: ModelConfig, arrays: Mapping[str, Array], fused: bool) -> None:
        self.nodes, self.config, self.arrays, self.fused = nodes, config, arrays, fused

    def tokens(self, mel: str) -> tuple[str, str]:
        """Encode (b, n, f) in pieces of `target_length` frames -> (b pieces, tokens, d), and the pieces per clip."""
        nodes, config = self.nodes, self.config
        mel = self._init_bn(mel)
        length = nodes.add("Min", nodes.size(mel, 1), nodes.ints(config.target_length))
        pieces = nodes.ints(1)
        if config.pad_last:
            frames = nodes.size(mel, 1)
            last = nodes.add("Sub", nodes.add("Add", frames, length), nodes.ints(1))
            pieces = nodes.add("Div", last, length)
            missing = nodes.add("Sub", nodes.add("Mul", pieces, length), frames)
            mel = nodes.add("Pad", mel, nodes.joined(0, 0, 0, 0, missing, 0))
            mel = nodes.add("Reshape", mel, nodes.joined(-1, length, config.n_mels))
        x = nodes.reshape(self._patches(mel, length), 0, -1, config.embed_dim)
        if config.pooling == "token":
            x = self._with_class_token(x)
        for number in range(config.depth):
            x = self._block(f"{BLOCKS}{number}", x)
        return nodes.layer_norm("norm", self.arrays, x, BLOCK_EPSILON), pieces

    def probabilities(self, tokens: str, pieces: str) -> str:
        """Pool the tokens of each piece, score and combine them, -> (b, c)."""
        pooling = self.config.pooling
        if pooling == "dm":
            return self._joined(self._mean(self._activated(self._scored(self._by_column(tokens)))), pieces)
        logits = self._scored(self._pooled(tokens))
        if pooling == "logit":
            return self._activated(self._joined(logits, pieces))
        return self._joined(self._activated(logits), pieces)

    def embedding(self, tokens: str, pieces: str) -> str:
        """Pool the tokens of each piece and take the mean of the pieces, -> (b, d)."""
        nodes = self.nodes
        by_piece = nodes.add("Reshape", self._pooled(tokens), nodes.joined(-1, pieces, self.config.embed_dim))
        return self._mean(by_piece)

    def columns(self, tokens: str, pieces: str, mel: str) -> str:
        """Score each column of patches of all pieces, without padding, -> (b, columns, c)."""
        nodes, config = self.nodes, self.config
        if config.pooling == "token":
            tokens = nodes.add("Slice", tokens, nodes.ints(1), nodes.ints(2**31), nodes.ints(1))
        by_column = self._by_column(tokens)
        each = nodes.size(by_column, 1)
        shape = nodes.joined(-1, nodes.add("Mul", pieces, each), config.outputdim)
        scores = nodes.add("Reshape", self._activated(self._scored(by_column)), shape)
        frames = nodes.size(mel, 1)
        length = nodes.add("Min", frames, nodes.ints(config.target_length))
        whole, rest = nodes.add("Div", frames, length), nodes.add("Mod", frames, length)
        inside = nodes.add("Add", nodes.add("Mul", whole, each), nodes.add("Div", rest, nodes.ints(PATCH)))
        return nodes.add("Slice", scores, nodes.ints(0), inside, nodes.ints(1))

    def _init_bn(self, mel: str) -> str:
        """Apply the BatchNorm as one multiplication and one addition a mel bin."""
        if not self.config.init_bn:
            return mel
        weight, bias, mean, variance = (
            self.arrays[f"init_bn.1.{name}"].astype(np.float64)
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / np.sqrt(variance + NORM_EPSILON)
        shift = bias - mean * scale
        scaled = self.nodes.add("Mul", mel, self.nodes.weight("init_bn.scale", scale))
        return self.nodes.add("Add", scaled, self.nodes.weight("init_bn.shift", shift))

    def _patches(self, mel: str, length: str) -> str:
        """Embed patches, (b, n, f) -> (b, f // 16, columns, d): without overlap the convolution is a matrix product."""
        nodes, rows = self.nodes, self.config.rows
        columns = nodes.add("Div", length, nodes.ints(PATCH))
        mel = nodes.add("Slice", mel, nodes.ints(0), nodes.add("Mul", columns, nodes.ints(PATCH)), nodes.ints(1))
        patches = nodes.add("Transpose", nodes.reshape(mel, 0, -1, PATCH, rows, PATCH), perm=[0, 3, 1, 2, 4])
        patches = nodes.reshape(patches, 0, rows, -1, PATCH * PATCH)
        weight, bias = (self.arrays[f"patch_embed.proj.{part}"] for part in ("weight", "bias"))
        kernel = weight[:, 0].transpose(2, 1, 0).reshape(PATCH * PATCH, -1)  # (time bin, d): patches are time first
        product = nodes.add("MatMul", patches, nodes.weight("patch_embed.weight", kernel))
        places = self.arrays["time_pos_embed"] + self.arrays["freq_pos_embed"] + bias[:, None, None]
        constant = nodes.weight("pos_embed", places.transpose(0, 2, 3, 1))
        return nodes.add("Add", product, nodes.add("Slice", constant, nodes.ints(0), columns, nodes.ints(2)))

    def _with_class_token(self, x: str) -> str:
        nodes = self.nodes
        token = nodes.weight("cls_token", self.arrays["cls_token"] + self.arrays["token_pos_embed"])
        one_each = nodes.add("Expand", token, nodes.joined(nodes.size(x, 0), 1, 1))
        return nodes.add("Concat", one_each, x, axis=1)

    def _block(self, name: str, x: str) -> str:
        nodes, arrays = self.nodes, self.arrays
        mixed = self._attention(f"{name}.attn", nodes.layer_norm(f"{name}.norm1", arrays, x, BLOCK_EPSILON))
        x = nodes.add("Add", x, mixed)
        hidden = nodes.linear(f"{name}.mlp.fc1", arrays, nodes.layer_norm(f"{name}.norm2", arrays, x, BLOCK_EPSILON))
        return nodes.add("Add", x, nodes.linear(f"{name}.mlp.fc2", arrays, self._gelu(hidden)))

    def _attention(self, name: str, x: str) -> str:
        nodes, arrays, heads = self.nodes, self.arrays, self.config.num_heads
        if self.fused:
            weight = nodes.weight(f"{name}.qkv.weight", arrays[f"{name}.qkv.weight"].T)
            bias = nodes.weight(f"{name}.qkv.bias", arrays[f"{name}.qkv.bias"])
            mixed = nodes.add("Attention", x, weight, bias, domain=RUNTIME, num_heads=heads)
            return nodes.linear(f"{name}.proj", arrays, mixed)
        dim = self.config.embed_dim
        query, key, value = (
            nodes.reshape(part, 0, 0, heads, dim // heads)
            for part in nodes.split(nodes.linear(f"{name}.qkv", arrays, x), -1, 3)
        )
        query = nodes.add("Mul", query, nodes.number((dim // heads) ** -0.5))
        query, value = (nodes.add("Transpose", part, perm=[0, 2, 1, 3]) for part in (query, value))
        scores = nodes.add("MatMul", query, nodes.add("Transpose", key, perm=[0, 2, 3, 1]))
        mixed = nodes.add("MatMul", nodes.add("Softmax", scores, axis=-1), value)
        mixed = nodes.reshape(nodes.add("Transpose", mixed, perm=[0, 2, 1, 3]), 0, 0, dim)
        return nodes.linear(f"{name}.proj", arrays, mixed)

    def _gelu(self, x: str) -> str:
        nodes = self.nodes
        if self.fused:
            return nodes.add("Gelu", x)
        raised = nodes.add("Add", nodes.add("Erf", nodes.add("Mul", x, nodes.number(0.5**0.5))), nodes.number(1.0))
        return nodes.add("Mul", nodes.add("Mul", x, raised), nodes.number(0.5))

    def _pooled(self, tokens: str) -> str:
        """Return the input of the output layer, (pieces, tokens, d) -> (pieces, d)."""
        if self.config.pooling == "token":
            return self.nodes.add("Gather", tokens, self.nodes.indices(np.int64(0)), axis=1)
        return self._mean(tokens)

    def _mean(self, x: str) -> str:
        """Return the mean over the middle axis.

        It is a matrix product: ReduceMean adds in an order that depends on the batch size, so the last bits of a clip's
        scores would depend on the other clips.
        """
        nodes, count = self.nodes, self.nodes.size(x, 1)
        ones = nodes.add("Expand", nodes.number(1.0), nodes.joined(1, count))
        sums = nodes.add("Squeeze", nodes.add("MatMul", ones, x), nodes.ints(1))
        return nodes.add("Div", sums, nodes.add("Cast", count, to=int(TensorProto.FLOAT)))

    def _by_column(self, tokens: str) -> str:
        """Return the mean over frequency, (pieces, tokens, d) -> (pieces, columns, d)."""
        nodes, config = self.nodes, self.config
        by_row = nodes.reshape(tokens, 0, config.rows, -1, config.embed_dim)
        return nodes.add("ReduceMean", by_row, nodes.ints(1), keepdims=0)

    def _scored(self, x: str) -> str:
        normed = self.nodes.layer_norm("outputlayer.0", self.arrays, x, NORM_EPSILON)
        return self.nodes.linear("outputlayer.1", self.arrays, normed)

    def _activated(self, logits: str) -> str:
        if self.config.activation == "sigmoid":
            return self.nodes.add("Sigmoid", logits)
        return self.nodes.add("Softmax", logits, axis=-1)

    def _joined(self, scores: str, pieces: str) -> str:
        """Combine the scores of the pieces of a long clip, (b pieces, c) -> (b, c)."""
        nodes = self.nodes
        by_piece = nodes.add("Reshape", scores, nodes.joined(-1, pieces, self.config.outputdim))
        if self.config.eval_avg == "mean":
            return self._mean(by_piece)
        return nodes.add("ReduceMax", by_piece, nodes.ints(1), keepdims=0)


# The log-mel front end: a Fourier transform as four small matrix products.
#
# ONNX's own STFT operator is several times slower. A frame x of N samples under a window w, which is symmetric about
# N/2, has the spectrum sum over n of w[n] x[n] exp(-2 pi i k n / N). The cosines are even about N/2, the sines odd, so
#
#     E[n] = w[n] (x[n] + x[N - n]),    O[n] = w[n] (x[n] - x[N - n]),    0 <= n <= N/2
#
# are their only factors; about N/4 both are even or odd again, by the parity of the bin k:
#
#     k even: cosines times E[n] + E[N/2 - n], sines times O[n] - O[N/2 - n],    0 <= n <= N/4
#     k odd:  cosines times E[n] - E[N/2 - n], sines times O[n] + O[N/2 - n]
#
# which is a quarter of the products. The window is 0 at n = 0, so x[N] does not matter.


def _log_mel(nodes: Nodes, settings: FrontEnd, waves: str) -> str:
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
    """Cut x[n] and x[N - n] out of each frame, both (b, 2, n, w): at least N/4 + 1 samples, from n = 0 and n = N/2.

    Frames are gathered in whole blocks of samples, which is faster than sample by sample. x[N - n] comes from the
    mirrored wave, whose frames are those of the wave in reverse order.
    """
    n_fft, hop = settings.n_fft, settings.hop_size
    missing = nodes.add("Max", nodes.add("Sub", nodes.ints(settings.min_samples), nodes.size(waves, 1)), nodes.ints(0))
    waves = nodes.add("Pad", waves, nodes.joined(0, 0, 0, missing))
    hops = nodes.add("Div", nodes.size(waves, 1), nodes.ints(hop))
    stop = nodes.add("Add", nodes.add("Mul", hops, nodes.ints(hop)), nodes.ints(n_fft))
    waves = nodes.add("Pad", waves, nodes.ints(0, n_fft // 2, 0, n_fft // 2 + 1), mode="reflect")

    block = _block_size(settings)
    forwards = nodes.add("Slice", waves, nodes.ints(0), stop, nodes.ints(1))
    backwards = nodes.add("Slice", waves, stop, nodes.ints(0), nodes.ints(1), nodes.ints(-1))
    count = nodes.add("Squeeze", nodes.add("Add", hops, nodes.ints(1)))
    order = nodes.add("Range", nodes.indices(np.int64(0)), count, nodes.indices(np.int64(1)))
    starts = nodes.add("Unsqueeze", nodes.add("Mul", order, nodes.ints(hop // block)), nodes.ints(1))  # (n, 1) blocks
    mirrored = nodes.add("Sub", nodes.add("Mul", hops, nodes.ints(hop // block)), starts)
    quarter = n_fft // 4 // block
    within = nodes.indices(np.array([[0], [2 * quarter]])[..., None] + np.arange(quarter + 1))  # (2, 1, blocks)

    return (
        _gathered(nodes, settings, forwards, starts, within),
        _gathered(nodes, settings, backwards, mirrored, within),
    )


def _gathered(nodes: Nodes, settings: FrontEnd, samples: str, starts: str, within: str) -> str:
    """Gather the frames that start at blocks `starts` (n, 1) from samples (b, t) -> (b, 2, n, w)."""
    width = _width(settings)
    in_blocks = nodes.reshape(samples, 0, -1, _block_size(settings))
    blocks = nodes.add("Gather", in_blocks, nodes.add("Add", starts, within), axis=1)
    return nodes.reshape(blocks, 0, 2, -1, width)


def _block_size(settings: FrontEnd) -> int:
    """Return the samples of a block; both hops and quarters of frames are whole numbers of blocks."""
    return math.gcd(settings.hop_size, settings.n_fft // 4)


def _width(settings: FrontEnd) -> int:
    """Return the samples that `_frames` cuts for a quarter of a frame: a quarter and one more block."""
    return settings.n_fft // 4 + _block_size(settings)


def _windows(settings: FrontEnd) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return w[n] and w[N/2 - n] for 0 <= n <= N/4, followed by zeros.

    Samples that pair with themselves, N/2 in the first fold and N/4 in the second, would count twice, so their window
    is halved.
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
    """Add the part of the even or odd bins in the mel bands, from the factors of their waves: -> (b, 1, n, f)."""
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
