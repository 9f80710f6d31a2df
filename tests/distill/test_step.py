import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ced.config import Mode, Optimizer, OptimizerArgs
from ced.distill.dataset import Batch
from ced.distill.distributed import World
from ced.distill.step import (
    ReconstructionLoss,
    Stepper,
    TargetLoss,
    TrainingBatch,
    initialize_batchnorm,
    learning_rate,
    make_optimizer,
)
from ced.distill.views import NO_VIEW, ViewRecipe, mask
from ced.errors import TrainingError
from ced.model.config import ModelConfig
from ced.model.mae import MaskedAutoencoder
from ced.model.vit import CED

ALONE = World(0, 1, torch.device("cpu"))


def network_of() -> CED:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CED(ModelConfig(32, 2, depth=1, target_length=64, outputdim=3, pooling="logit"))


def stepper_of(network: CED, loss: Callable[[Tensor, Tensor], Tensor], mode: Mode = "off") -> Stepper:
    return Stepper(network, TargetLoss(network, loss), ALONE, mode=mode)


def batch_of(targets: Tensor, recipe: ViewRecipe = NO_VIEW, mixup: Tensor | None = None) -> TrainingBatch:
    generator = torch.Generator().manual_seed(1)
    count = len(targets)
    waves = torch.randint(-3000, 3000, (count, 6400), dtype=torch.int16, generator=generator)
    chunks = Batch(np.arange(count), waves, torch.rand((count, 2), generator=generator))
    return TrainingBatch(chunks, recipe, targets=targets, mixup=mixup)


def schedule(**changes: Any) -> list[float]:
    settings = {"peak": 0.5, "warmup": 4, "total": 12, "decay_frac": 0.2, "cosine": True} | changes
    return [learning_rate(step, **settings) for step in range(12)]


def test_the_rate_rises_linearly_then_falls_as_a_cosine() -> None:
    # 0.5 * (0.2 + 0.8 * (1 + cos(pi k / 8)) / 2), k = 0, 1, ...
    falling = [0.5, 0.4847759, 0.4414214, 0.3765367, 0.3, 0.2234633, 0.1585786, 0.1152241]
    assert schedule() == pytest.approx([0.0, 0.125, 0.25, 0.375, *falling], abs=1e-7)
    assert learning_rate(12, peak=0.5, warmup=4, total=12, decay_frac=0.2, cosine=True) == pytest.approx(0.1)


def test_without_a_scheduler_the_rate_is_constant_after_the_warmup() -> None:
    assert schedule(cosine=False) == [0.0, 0.125, 0.25, 0.375] + [0.5] * 8
    assert schedule(cosine=False, warmup=0) == [0.5] * 12


def test_a_warmup_longer_than_the_run_never_reaches_the_peak() -> None:
    assert schedule(warmup=24) == pytest.approx([0.5 * step / 24 for step in range(12)])


@pytest.mark.parametrize(
    ("name", "kind"), [("Adam", torch.optim.Adam), ("AdamW", torch.optim.AdamW), ("Adam8bit", torch.optim.Adam)]
)
def test_the_optimizer_has_the_configured_type_and_arguments(
    name: Optimizer, kind: type[torch.optim.Optimizer]
) -> None:
    arguments = OptimizerArgs(lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)
    optimizer = make_optimizer(name, arguments, [torch.nn.Parameter(torch.ones(1))], torch.device("cpu"))
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.01, 0.1, (0.8, 0.9), 1e-6)


def test_a_step_masks_then_mixes_then_updates_at_its_learning_rate() -> None:
    network, reference = network_of(), network_of()
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.5]])
    batch = batch_of(targets, ViewRecipe(None, time_mask=20, freq_mask=16), mixup=torch.tensor([0.75, 0.25]))
    loss = stepper_of(network, F.binary_cross_entropy_with_logits).step(batch, 0.25)

    mel = mask(reference.front_end(batch.chunks.waves.float() / 32768), batch.chunks.uniforms, batch.recipe)
    mixed = torch.stack([0.75 * mel[0] + 0.25 * mel[1], 0.25 * mel[1] + 0.75 * mel[0]])
    goal = torch.tensor([[0.75, 0.25, 0.125], [0.75, 0.25, 0.125]])
    expected = F.binary_cross_entropy_with_logits(reference.forward_mel(mixed), goal)
    torch.testing.assert_close(loss, expected.detach())
    # Adam's first step moves each weight by the learning rate.
    moved = network.get_parameter("outputlayer.1.bias") - reference.get_parameter("outputlayer.1.bias")
    torch.testing.assert_close(moved.abs(), torch.full((3,), 0.25), rtol=1e-4, atol=0)


def test_a_reconstruction_step_minimises_the_error_of_the_hidden_patches() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = CED(ModelConfig(32, 2, depth=1, target_length=64, outputdim=1, pooling="token"))
        autoencoder = MaskedAutoencoder(network, 2, ratio=0.75, width=16, heads=2, depth=1)
    hidden = autoencoder.hide(2, torch.Generator().manual_seed(2))
    chunks = batch_of(torch.zeros(2, 1)).chunks
    reference = copy.deepcopy(autoencoder)
    stepper = Stepper(network, ReconstructionLoss(autoencoder), ALONE)
    loss = stepper.step(TrainingBatch(chunks, NO_VIEW, hidden=hidden), 0.01)

    mel = network.front_end(chunks.waves.float() / 32768)
    initialize_batchnorm(reference.encoder, mel)
    errors = reference(mel, hidden)
    torch.testing.assert_close(loss, errors[hidden].mean().detach())
    moved = autoencoder.decoder_pred.weight - reference.decoder_pred.weight
    assert bool(moved.any())


def test_a_step_continues_from_a_saved_state_bit_for_bit() -> None:
    batch = batch_of(torch.eye(3)[:2], ViewRecipe(None, 20, 16))
    unbroken = stepper_of(network_of(), F.cross_entropy)
    unbroken.step(batch, 0.01)
    resumed = stepper_of(network_of(), F.cross_entropy)
    resumed.load_state_dict(copy.deepcopy(unbroken.state_dict()))
    losses = [stepper.step(batch, 0.01) for stepper in (unbroken, resumed)]
    assert torch.equal(*losses)
    for one, two in zip(unbroken.network.state_dict().values(), resumed.network.state_dict().values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("key", "other", "message"),
    [
        ("optimizer", "Adam8bit", "Adam8bit in float32, .* Adam in float32"),
        ("precision", "float16", "Adam in float16, .* Adam in float32"),
    ],
)
def test_a_state_of_other_hardware_is_refused(key: str, other: str, message: str) -> None:
    state = stepper_of(network_of(), F.cross_entropy).state_dict()
    state["kind"][key] = other
    with pytest.raises(TrainingError, match=message):
        stepper_of(network_of(), F.cross_entropy).load_state_dict(state)


def test_the_weights_in_a_state_have_the_names_of_the_network() -> None:
    """States written by earlier releases are read by these names."""
    assert stepper_of(network_of(), F.cross_entropy).state_dict()["network"].keys() == network_of().state_dict().keys()


def test_a_batch_too_large_for_the_gpu_names_batch_size() -> None:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    with pytest.raises(TrainingError, match=r"2 items .* smaller batch_size"):
        stepper_of(network_of(), loss).step(batch_of(torch.zeros(2, 3)), 0.01)


def test_a_scaler_skips_a_step_without_finite_gradients_and_is_saved() -> None:
    """As with fp16 on a GPU; the scaler itself is the same on a CPU."""

    def scaled_stepper() -> Stepper:
        stepper = stepper_of(network_of(), F.binary_cross_entropy_with_logits)
        stepper.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return stepper

    stepper, targets = scaled_stepper(), torch.zeros(2, 3)
    weight = stepper.network.get_parameter("outputlayer.1.weight")
    before = weight.detach().clone()
    stepper.step(batch_of(targets + torch.inf), 0.01)
    assert torch.equal(weight, before)
    assert stepper.scaler.get_scale() == 512
    resumed = scaled_stepper()
    resumed.load_state_dict(copy.deepcopy(stepper.state_dict()))
    assert resumed.scaler.get_scale() == 512
    loss = stepper.step(batch_of(targets), 0.01)
    assert not torch.equal(weight, before)
    # Gradients are unscaled before the update: the step is that of a stepper without a scaler.
    plain = stepper_of(network_of(), F.binary_cross_entropy_with_logits)
    torch.testing.assert_close(plain.step(batch_of(targets), 0.01), loss)
    torch.testing.assert_close(plain.network.get_parameter("outputlayer.1.weight"), weight)


@pytest.mark.parametrize(("mode", "half"), [("off", False), ("amp", False), ("amp_bf16", True)])
def test_on_a_cpu_only_bf16_is_computed_in_half_precision(mode: Mode, half: bool) -> None:
    seen = []
    network = network_of()
    network.blocks[0].register_forward_hook(lambda module, inputs, out: seen.append(module.mlp.fc1(inputs[0]).dtype))
    stepper = stepper_of(network, F.binary_cross_entropy_with_logits, mode)
    loss = stepper.step(batch_of(torch.zeros(2, 3)), 0.01)
    assert seen == [torch.bfloat16 if half else torch.float32]
    assert loss.dtype == torch.float32
    assert not stepper.scaler.is_enabled()


def test_a_new_batchnorm_starts_with_the_statistics_of_its_first_batch() -> None:
    network = network_of()
    mel = torch.randn(4, 64, 40) * 5 - 30
    initialize_batchnorm(network, mel)
    state = network.state_dict()
    torch.testing.assert_close(state["init_bn.1.running_mean"], mel.transpose(0, 1).flatten(1).mean(1))
    torch.testing.assert_close(state["init_bn.1.running_var"], mel.transpose(0, 1).flatten(1).var(1))
    state["init_bn.1.num_batches_tracked"].fill_(1)
    initialize_batchnorm(network, mel + 7)
    torch.testing.assert_close(network.state_dict()["init_bn.1.running_mean"], mel.mean((0, 2)))


def test_frozen_parameters_and_batchnorm_statistics_do_not_change() -> None:
    network = network_of()
    network.requires_grad_(False)
    network.outputlayer.requires_grad_(True)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    stepper = stepper_of(network, F.binary_cross_entropy_with_logits)
    stepper.step(batch_of(torch.zeros(2, 3)), 0.01)
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed <= {f"outputlayer.{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")}
    assert "outputlayer.1.bias" in changed
