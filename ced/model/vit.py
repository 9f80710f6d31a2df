"""The network: a vision transformer over log-mel features."""

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ced.errors import ConfigError
from ced.model.config import ModelConfig
from ced.model.frontend import LogMel
from ced.sound.features import PATCH
from ced.sound.labels import ClassTable, default_classes


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens, (b, tokens, d) -> (b, tokens, d)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (b, tokens, 3, heads, d / heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(attend(query, key, value).transpose(1, 2).flatten(2))
        return out


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return scaled dot-product attention of (b, heads, tokens, d / heads) each, in the same shape.

    In half precision on a CPU it is two products and a softmax: PyTorch's fused attention needs three times as long
    there for the result and its gradients (`python benchmarks/distill.py --only attention`).
    """
    if query.device.type != "cpu" or query.dtype == torch.float32:
        return F.scaled_dot_product_attention(query, key, value)
    weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    mixed: Tensor = weights.softmax(-1).to(value.dtype) @ value
    return mixed


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token, (b, tokens, d) -> (b, tokens, d)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then transform, each on top of its input: (b, tokens, d) -> (b, tokens, d)."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbed(nn.Module):
    """Cut features into square patches and project each to the width of the network."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, dim, kernel_size=PATCH, stride=PATCH)

    def forward(self, mel: Tensor) -> Tensor:
        """Embed patches, (b, f, n) -> (b, d, f // 16, n // 16).

        Patches do not overlap, so the convolution is one matrix product, whose backward pass on a CPU takes a fifth.
        """
        whole = mel[..., : mel.shape[-1] // PATCH * PATCH]
        patches = whole.unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH)).transpose(2, 3).flatten(3)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias).permute(0, 3, 1, 2)


class CED(nn.Module):
    """A tagger: waves or log-mel features in, one score per class out.

    The names of parameters are those of the published checkpoints. Without `labels`, 527 classes are AudioSet's, and
    other numbers of classes are numbered.
    """

    def __init__(self, config: ModelConfig, labels: ClassTable | None = None) -> None:
        super().__init__()
        self.config = config
        self.labels = labels or default_classes(config.outputdim)
        if len(self.labels) != config.outputdim:
            raise ConfigError(f"the class table has {len(self.labels)} classes, the network {config.outputdim} outputs")
        dim = config.embed_dim
        self.front_end = LogMel(config.front_end)
        # Every mel bin is a channel; published state dicts know the layer as "init_bn.1".
        layers = {"1": nn.BatchNorm1d(config.n_mels, momentum=0.01)} if config.init_bn else {}
        self.init_bn = nn.Sequential(OrderedDict(layers))
        self.patch_embed = PatchEmbed(dim)
        self.time_pos_embed = nn.Parameter(torch.empty(1, dim, 1, config.columns))
        self.freq_pos_embed = nn.Parameter(torch.empty(1, dim, config.rows, 1))
        if config.pooling == "token":
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
            self.token_pos_embed = nn.Parameter(torch.empty(1, dim))
        self.blocks = nn.ModuleList(Block(dim, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.outputlayer = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, config.outputdim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights: linear layers truncated normal (std 0.02), embeddings normal (std 0.02), biases 0."""
        for name, parameter in self.named_parameters():
            if name.endswith(("_pos_embed", "token_pos_embed", "cls_token")):
                nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, waves: Tensor) -> Tensor:
        """Score waves: `forward_mel` of their log-mel features.

        Args:
            waves: (b, t) float in [-1, 1], 16 kHz, of any length.

        Returns:
            (b, c) probabilities; with pooling "logit", logits.
        """
        return self.forward_mel(self.front_end(waves))

    def forward_mel(self, mel: Tensor) -> Tensor:
        """Score log-mel features.

        Args:
            mel: (b, f, n) dB, n >= 16; longer ones than `target_length` frames are scored in pieces.

        Returns:
            (b, c) probabilities; with pooling "logit", logits.
        """
        return self._join(self.in_pieces(mel, self._head))

    def logits_mel(self, mel: Tensor) -> Tensor:
        """Return the logits whose activation is `as_probs(forward_mel(mel))`, (b, f, n) -> (b, c).

        Where probabilities are averaged, over pieces or with pooling "dm" over columns, these are the log-odds of the
        average. With eval_avg "max" and softmax, the activation renormalises the largest scores.
        """
        if self.config.pooling == "logit":
            return self.forward_mel(mel)
        pieces = self.in_pieces(mel, self._piece_logits)
        if self.config.eval_avg == "mean":
            return self._mean_odds(pieces)
        return (pieces if self.config.activation == "sigmoid" else pieces.log_softmax(-1)).amax(1)

    def in_pieces(self, mel: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `score` to the tokens of each piece of `target_length` frames, (b, f, n) -> (b, pieces, ...)."""
        mel = self.normed(mel)
        (batch, _, frames), limit = mel.shape, self.config.target_length
        if frames > limit and not self.config.pad_last:
            pieces = [piece for piece in mel.split(limit, dim=-1) if piece.shape[-1] >= PATCH]
            return torch.stack([score(self._encode(piece)) for piece in pieces], dim=1)
        length = min(frames, limit)
        count = (frames + length - 1) // length
        mel = F.pad(mel, (0, count * length - frames)).unflatten(-1, (count, length))
        mel = mel.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(0, 1)
        scored: Tensor = score(self._encode(mel)).unflatten(0, (batch, count))
        return scored

    def normed(self, mel: Tensor) -> Tensor:
        """Normalise log-mel features, in the type of the weights, (b, f, n) -> the same."""
        out: Tensor = self.init_bn(mel.to(self.freq_pos_embed.dtype))
        return out

    def _join(self, scores: Tensor) -> Tensor:
        """Combine the scores of the pieces of a long input, (b, pieces, c) -> (b, c)."""
        return scores.mean(1) if self.config.eval_avg == "mean" else scores.amax(1)

    def probs(self, waves: Tensor) -> Tensor:
        """Return the probability of each class, (b, t) -> (b, c), for any pooling."""
        return self.as_probs(self(waves))

    def as_probs(self, scores: Tensor) -> Tensor:
        """Turn the result of `forward` or `forward_mel` into probabilities, float32 (b, c)."""
        return self.activate(scores.float()) if self.config.pooling == "logit" else scores.float()

    def activate(self, logits: Tensor) -> Tensor:
        """Turn logits into probabilities, (..., c) -> the same."""
        return logits.sigmoid() if self.config.activation == "sigmoid" else logits.softmax(-1)

    def _encode(self, mel: Tensor) -> Tensor:
        """Encode normalised (b, f, n), n <= target_length -> tokens (b, f // 16 * n // 16, d) after any class token."""
        return self.relate(self.embed_patches(mel))

    def embed_patches(self, mel: Tensor) -> Tensor:
        """Embed patches and add their positions: normalised (b, f, n), n <= target_length -> (b, tokens, d)."""
        x = self.patch_embed(mel)
        x = x + self.time_pos_embed[..., : x.shape[-1]] + self.freq_pos_embed
        out: Tensor = x.flatten(2).transpose(1, 2)  # frequency slowest
        return out

    def relate(self, x: Tensor) -> Tensor:
        """Pass tokens through the blocks, (b, tokens, d) -> the same, after a class token if there is one."""
        if self.config.pooling == "token":
            token = (self.cls_token + self.token_pos_embed).expand(x.shape[0], -1, -1)
            x = torch.cat([token, x], dim=1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out

    def patch_tokens(self, mel: Tensor) -> Tensor:
        """Return the tokens of each patch after the last LayerNorm, without any class token.

        Features longer than `target_length` are encoded in pieces of whole patches, so that columns stay evenly spaced;
        the frames after the last whole patch are left out.

        Args:
            mel: (b, f, n) dB, n >= 16.

        Returns:
            (b, f // 16, n // 16, d)
        """
        whole = mel[..., : mel.shape[-1] // PATCH * PATCH]
        pieces = self.normed(whole).split(self.config.columns * PATCH, dim=-1)
        tokens = [self.relate(self.embed_patches(piece)) for piece in pieces]
        patches = [
            each[:, -self.config.rows * (piece.shape[-1] // PATCH) :].unflatten(1, (self.config.rows, -1))
            for each, piece in zip(tokens, pieces, strict=True)
        ]
        return torch.cat(patches, dim=2)

    def _head(self, tokens: Tensor) -> Tensor:
        """Pool tokens (b, tokens, d) and score them, (b, c)."""
        logits = self._scored(tokens)
        if self.config.pooling == "dm":
            return self.activate(logits).mean(1)
        return logits if self.config.pooling == "logit" else self.activate(logits)

    def _piece_logits(self, tokens: Tensor) -> Tensor:
        """Return the logits of what `_head` returns."""
        logits = self._scored(tokens)
        return self._mean_odds(logits) if self.config.pooling == "dm" else logits

    def _scored(self, tokens: Tensor) -> Tensor:
        """Pool tokens (b, tokens, d) for the output layer, -> (b, c); with pooling "dm" (b, columns, c)."""
        if self.config.pooling == "dm":
            tokens = tokens.unflatten(1, (self.config.rows, -1))
        logits: Tensor = self.outputlayer(tokens[:, 0] if self.config.pooling == "token" else tokens.mean(1))
        return logits

    def _mean_odds(self, logits: Tensor) -> Tensor:
        """Return the logits of the mean probability of several parts, (b, parts, c) -> (b, c)."""
        if logits.shape[1] == 1:
            return logits[:, 0]
        if self.config.activation == "softmax":
            return logits.log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])
        return F.logsigmoid(logits).logsumexp(1) - F.logsigmoid(-logits).logsumexp(1)
