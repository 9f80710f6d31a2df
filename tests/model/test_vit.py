"""The network against the published names and shapes, and against a second derivation in NumPy."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ced.errors import ConfigError
from ced.model.config import POOLINGS, ModelConfig, Pooling
from ced.model.vit import CED, attend
from ced.sound.labels import ClassTable, audioset

SIZES = {"tiny": (192, 3, 5.5), "mini": (256, 4, 9.6), "small": (384, 6, 22), "base": (768, 12, 86)}
SMALL = ModelConfig(embed_dim=8, num_heads=2, depth=2, outputdim=5, target_length=64)


def published_shapes(d: int, depth: int = 12, classes: int = 527) -> dict[str, tuple[int, ...]]:
    """Write out the state dict of the published checkpoints, without the buffers of their front end."""

    def norm(name: str, width: int = d) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    shapes: dict[str, tuple[int, ...]] = {"time_pos_embed": (1, d, 1, 63), "freq_pos_embed": (1, d, 4, 1)}
    shapes |= norm("init_bn.1", 64) | {"init_bn.1.running_mean": (64,), "init_bn.1.running_var": (64,)}
    shapes |= {"init_bn.1.num_batches_tracked": ()}
    shapes |= {"patch_embed.proj.weight": (d, 1, 16, 16), "patch_embed.proj.bias": (d,)}
    for block in (f"blocks.{index}" for index in range(depth)):
        shapes |= norm(f"{block}.norm1") | linear(f"{block}.attn.qkv", d, 3 * d) | linear(f"{block}.attn.proj", d, d)
        shapes |= norm(f"{block}.norm2") | linear(f"{block}.mlp.fc1", d, 4 * d) | linear(f"{block}.mlp.fc2", 4 * d, d)
    return shapes | norm("norm") | norm("outputlayer.0") | linear("outputlayer.1", d, classes)


def network(config: ModelConfig = SMALL, seed: int = 0) -> CED:
    """Make a network in eval mode whose every weight matters: norms, biases and statistics are random too."""
    generator = torch.Generator().manual_seed(seed)
    model = CED(config)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
            if name.endswith("running_var") or (name.endswith("weight") and value.dim() == 1):  # scales
                value.abs_().add_(0.5)
    return model.eval()


def mels(clips: int, frames: int, seed: int = 1) -> Tensor:
    return 2.0 * torch.randn(clips, 64, frames, generator=torch.Generator().manual_seed(seed))


def second_derivation(model: CED, mel: Tensor, pooling: Pooling) -> NDArray[np.float64]:
    """Score one picture (64, n), n <= target_length, in float64 and from the definition alone -> (c,)."""
    w = {name: value.double().numpy() for name, value in model.state_dict().items()}

    def norm(x: Any, name: str, eps: float) -> Any:
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Any, name: str) -> Any:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def sigmoid(x: Any) -> Any:
        return 1.0 / (1.0 + np.exp(-x))

    def attend(x: Any, name: str) -> Any:
        width = x.shape[1] // model.config.num_heads
        qkv, heads = linear(x, f"{name}.qkv"), []
        for start in range(0, x.shape[1], width):
            q, k, v = (qkv[:, part * x.shape[1] + start :][:, :width] for part in range(3))
            weights = np.exp(q @ k.T / math.sqrt(width))
            heads.append(weights / weights.sum(1, keepdims=True) @ v)
        return linear(np.concatenate(heads, axis=1), f"{name}.proj")

    def head(x: Any) -> Any:
        return linear(norm(x, "outputlayer.0", 1e-5), "outputlayer.1")

    bn = [w[f"init_bn.1.{part}"][:, None] for part in ("running_mean", "running_var", "weight", "bias")]
    picture = (mel.double().numpy() - bn[0]) / np.sqrt(bn[1] + 1e-5) * bn[2] + bn[3]
    tokens = []
    for row in range(4):  # frequency slowest
        for column in range(picture.shape[1] // 16):
            patch = picture[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            token = (w["patch_embed.proj.weight"][:, 0] * patch).sum((1, 2)) + w["patch_embed.proj.bias"]
            tokens.append(token + w["time_pos_embed"][0, :, 0, column] + w["freq_pos_embed"][0, :, row, 0])
    if pooling == "token":
        tokens.insert(0, w["cls_token"][0, 0] + w["token_pos_embed"][0])
    x = np.stack(tokens)
    erf = np.vectorize(math.erf)
    for block in (f"blocks.{index}" for index in range(model.config.depth)):
        x = x + attend(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn")
        hidden = linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")
        x = x + linear(0.5 * hidden * (1.0 + erf(hidden / math.sqrt(2.0))), f"{block}.mlp.fc2")
    x = norm(x, "norm", 1e-6)
    scores = {
        "mean": lambda: sigmoid(head(x.mean(0))),
        "logit": lambda: head(x.mean(0)),
        "token": lambda: sigmoid(head(x[0])),
        "dm": lambda: sigmoid(head(x.reshape(4, -1, x.shape[1]).mean(0))).mean(0),
    }
    return np.asarray(scores[pooling]())


@pytest.mark.parametrize("size", SIZES)
def test_published_names_shapes_and_parameter_counts(size: str) -> None:
    width, heads, millions = SIZES[size]
    with torch.device("meta"):
        model = CED(ModelConfig(embed_dim=width, num_heads=heads))
    shapes = published_shapes(width)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == shapes
    parameters = sum(math.prod(shape) for name, shape in shapes.items() if "running" not in name and shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert parameters / 1e6 == pytest.approx(millions, rel=0.02)
    assert model.config.target_length == 1012


def test_class_token_parameters() -> None:
    with torch.device("meta"):
        model = CED(ModelConfig(embed_dim=192, num_heads=3, pooling="token"))
    extra = {"cls_token": (1, 1, 192), "token_pos_embed": (1, 192)}
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == published_shapes(192) | extra


@pytest.mark.parametrize("frames", [64, 63, 40, 16])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_matches_a_second_derivation(pooling: Pooling, frames: int) -> None:
    model = network(replace(SMALL, pooling=pooling))
    mel = mels(2, frames)
    expected = np.stack([second_derivation(model, clip, pooling) for clip in mel])
    assert expected.std() > 0.01
    np.testing.assert_allclose(model.forward_mel(mel).detach().numpy(), expected, atol=2e-5)


def test_probabilities_are_the_activation_of_the_logits() -> None:
    mel = mels(3, 40)
    scores = {pooling: network(replace(SMALL, pooling=pooling)) for pooling in POOLINGS[:2]}
    logits = scores["logit"].forward_mel(mel)
    torch.testing.assert_close(logits.sigmoid(), scores["mean"].forward_mel(mel))
    torch.testing.assert_close(scores["logit"].as_probs(logits), scores["mean"].forward_mel(mel))


def test_softmax_makes_classes_exclusive() -> None:
    mel = mels(3, 40)
    model = network(replace(SMALL, activation="softmax"))
    logits = network(replace(SMALL, pooling="logit")).forward_mel(mel)
    torch.testing.assert_close(model.forward_mel(mel), logits.exp() / logits.exp().sum(1, keepdim=True))


def pieces(model: CED, mel: Tensor, *bounds: int) -> Tensor:
    """Score pieces between neighbouring bounds, filled up with what the BatchNorm maps to zero, (pieces, b, c)."""
    norm = {name: value[:, None] for name, value in model.init_bn.state_dict().items() if value.dim()}
    zero = norm["1.running_mean"] - norm["1.bias"] * (norm["1.running_var"] + 1e-5).sqrt() / norm["1.weight"]
    filling = zero.expand(len(mel), -1, model.config.target_length)
    cut = [mel[..., start:end] for start, end in pairwise(bounds)]
    return torch.stack([model.forward_mel(torch.cat([piece, filling], -1)[..., :64]) for piece in cut])


@pytest.mark.parametrize("frames", [65, 100, 128, 129, 192])
def test_long_inputs_are_cut_and_joined(frames: int) -> None:
    bounds = [*range(0, frames, 64), frames]  # of 128 and 192 frames, two and three whole pieces: none is lost
    mel = mels(2, frames)
    mean = network()
    expected = pieces(mean, mel, *bounds)
    assert len(expected) == math.ceil(frames / 64)
    torch.testing.assert_close(mean.forward_mel(mel), expected.mean(0), atol=1e-6, rtol=0)
    loudest = network(replace(SMALL, eval_avg="max"))
    torch.testing.assert_close(loudest.forward_mel(mel), expected.amax(0), atol=1e-6, rtol=0)


def test_without_padding_the_last_piece_keeps_its_length() -> None:
    model = network(replace(SMALL, pad_last=False))
    first, last = model.forward_mel(mels(2, 104)[..., :64]), model.forward_mel(mels(2, 104)[..., 64:])
    torch.testing.assert_close(model.forward_mel(mels(2, 104)), (first + last) / 2, atol=1e-6, rtol=0)
    # Less than one patch cannot be scored: it is left out. A whole piece stays.
    torch.testing.assert_close(model.forward_mel(mels(2, 104)[..., :79]), first, atol=1e-6, rtol=0)
    twice = model.forward_mel(torch.cat([mels(2, 104)[..., :64]] * 2, dim=-1))
    torch.testing.assert_close(twice, first, atol=1e-6, rtol=0)


def test_short_waves_are_padded_to_one_patch() -> None:
    model = network()
    wave = torch.rand(1, 1_000, generator=torch.Generator().manual_seed(2)) - 0.5
    filled = torch.cat([wave, torch.zeros(1, 1_400)], dim=1)
    assert torch.equal(model(wave), model(filled))
    assert model(torch.zeros(2, 0)).shape == (2, 5)


def test_scores_do_not_depend_on_the_batch() -> None:
    model = network(ModelConfig(embed_dim=64, num_heads=1, depth=2))
    loudness = torch.tensor([1.0, 1e-4, 0.0, 0.2])[:, None]
    waves = loudness * (torch.rand(4, 16_000, generator=torch.Generator().manual_seed(4)) - 0.5)
    with torch.inference_mode():
        together = model(waves)
        alone = torch.cat([model(wave[None]) for wave in waves])
    assert alone.std(0).max() > 0.01
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_autocast_leaves_the_features_in_float32() -> None:
    model = network()
    seen: list[Tensor] = []
    model.front_end.register_forward_hook(lambda module, inputs, mel: seen.append(mel))
    wave = torch.rand(1, 8_000, generator=torch.Generator().manual_seed(5))
    exact = model.probs(wave)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model.probs(wave)
    assert seen[1].dtype == torch.float32
    assert torch.equal(seen[0], seen[1])
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)  # the network itself did run in bfloat16
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0)


def test_attention_in_half_precision_is_attention() -> None:
    generator = torch.Generator().manual_seed(6)
    inputs = [torch.randn(2, 3, 40, 16, generator=generator, requires_grad=True) for _ in range(3)]
    query, key, value = inputs
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs]
    query, key, value = halves
    rough = attend(query, key, value)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.02, rtol=0.02)
    for half, whole in zip(
        torch.autograd.grad(rough.float().sum(), halves),
        torch.autograd.grad(exact.sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(half.float(), whole, atol=0.03, rtol=0.03)


def test_fresh_weights() -> None:
    model = CED(ModelConfig(embed_dim=128, num_heads=2, depth=2))
    for name, parameter in model.named_parameters():
        if "norm" in name or name.startswith(("init_bn", "outputlayer.0", "patch_embed")):
            continue
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name


def test_class_tables() -> None:
    with torch.device("meta"):
        assert CED(replace(SMALL, outputdim=527)).labels is audioset()
        assert CED(SMALL).labels.names == ("class 0", "class 1", "class 2", "class 3", "class 4")
        with pytest.raises(ConfigError, match="2 classes, the network 5 outputs"):
            CED(SMALL, ClassTable(("a", "b")))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pooling": "max"}, "pooling is 'max'; allowed: mean, logit, token, dm"),
        ({"eval_avg": "median"}, "eval_avg is 'median'"),
        ({"num_heads": 3}, "embed_dim 8 is not a multiple of num_heads 3"),
        ({"depth": 0}, "depth is 0"),
        ({"n_mels": 60}, "n_mels is 60; it must be a multiple of 16"),
        ({"target_length": 15}, "target_length is 15"),
        ({"f_max": 9000.0}, "f_max 9000.0 must rise within 0-8000 Hz"),
    ],
)
def test_wrong_configurations(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **wrong)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("frames", [60, 150, 170])  # one piece of 64; three, the last of 22; three, the last of 42
@pytest.mark.parametrize("pad_last", [True, False])
def test_activated_logits_are_the_probabilities(
    pooling: Pooling, activation: Literal["sigmoid", "softmax"], frames: int, pad_last: bool
) -> None:
    torch.manual_seed(0)
    model = CED(replace(SMALL, pooling=pooling, activation=activation, pad_last=pad_last)).eval()
    mel = 10 * torch.randn(2, 64, frames)
    with torch.inference_mode():
        model.outputlayer.get_parameter("1.weight").mul_(100)  # scores far apart
        logits = model.logits_mel(mel)
        probs = logits.sigmoid() if activation == "sigmoid" else logits.softmax(-1)
        torch.testing.assert_close(probs, model.as_probs(model.forward_mel(mel)), atol=1e-6, rtol=1e-5)


def test_logits_of_one_piece_are_those_of_the_output_layer() -> None:
    torch.manual_seed(0)
    sure = CED(SMALL).eval()
    mel = torch.randn(1, 64, 32)
    with torch.inference_mode():
        sure.outputlayer.get_parameter("1.bias").fill_(
            60.0
        )  # a probability of 1 in float32, whose log-odds are infinite
        assert float((sure.logits_mel(mel) - 60).abs().max()) < 1
        assert torch.equal(sure.forward_mel(mel), torch.ones(1, 5))
        assert torch.isfinite(sure.logits_mel(torch.randn(1, 64, 100))).all()  # two pieces
        largest = CED(replace(SMALL, eval_avg="max")).eval()
        long = torch.randn(1, 64, 128)
        torch.testing.assert_close(largest.logits_mel(long).sigmoid(), largest.forward_mel(long))
