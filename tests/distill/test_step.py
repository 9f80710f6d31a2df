import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ced.config import Mode, TrainConfig, check
from ced.distill.dataset import Batch
from ced.distill.distributed import World
from ced.distill.step import Stepper, calibrate, learning_rate, make_optimizer
from ced.distill.views import NO_VIEW, ViewRecipe, mask
from ced.errors import ConfigError, TrainingError
from ced.model.config import ModelConfig
from ced.model.vit import CED

ALONE = World(0, 1, torch.device("cpu"))


def config_of(**changes: Any) -> TrainConfig:
    values = {"train_data": "t", "logitspath": "l", "model": "ced_tiny", "optimizer": "Adam", "mode": "off"}
    return check(TrainConfig, values | changes, "test")


def network_of() -> CED:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CED(ModelConfig(32, 2, depth=1, target_length=64, outputdim=3, pooling="logit"))


def batch_of(count: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    waves = torch.randint(-3000, 3000, (count, 6400), dtype=torch.int16, generator=generator)
    return Batch(np.arange(count), waves, torch.rand((count, 2), generator=generator))


def schedule(**changes: Any) -> list[float]:
    settings = {"peak": 0.5, "warmup": 4, "total": 12, "decay_frac": 0.2, "cosine": True} | changes
    return [learning_rate(step, **settings) for step in range(12)]


def test_the_rate_rises_in_a_line_then_falls_as_a_cosine() -> None:
    # 0.5 * (0.2 + 0.8 * (1 + cos(pi k / 8)) / 2), k = 0, 1, ...
    falling = [0.5, 0.4847759, 0.4414214, 0.3765367, 0.3, 0.2234633, 0.1585786, 0.1152241]
    assert schedule() == pytest.approx([0.0, 0.125, 0.25, 0.375, *falling], abs=1e-7)
    assert learning_rate(12, peak=0.5, warmup=4, total=12, decay_frac=0.2, cosine=True) == pytest.approx(0.1)


def test_without_a_scheduler_the_rate_stays_after_the_warmup() -> None:
    assert schedule(cosine=False) == [0.0, 0.125, 0.25, 0.375] + [0.5] * 8
    assert schedule(cosine=False, warmup=0) == [0.5] * 12


def test_a_warmup_longer_than_the_run_never_arrives() -> None:
    assert schedule(warmup=24) == pytest.approx([0.5 * step / 24 for step in range(12)])


@pytest.mark.parametrize(
    ("name", "kind"), [("Adam", torch.optim.Adam), ("AdamW", torch.optim.AdamW), ("Adam8bit", torch.optim.Adam)]
)
def test_the_optimizer_is_the_one_asked_for(name: str, kind: type[torch.optim.Optimizer]) -> None:
    arguments = {"lr": 0.01, "weight_decay": 0.1, "betas": [0.8, 0.9], "eps": 1e-6}
    config = config_of(optimizer=name, optimizer_args=arguments)
    optimizer = make_optimizer(config, [torch.nn.Parameter(torch.ones(1))], torch.device("cpu"))
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.01, 0.1, (0.8, 0.9), 1e-6)


@pytest.mark.parametrize("betas", [[1.5, 0.9], [0.9, 1.0], [-0.1, 0.9]])
def test_betas_that_no_optimizer_takes_are_refused(betas: list[float]) -> None:
    with pytest.raises(ConfigError, match="betas"):
        config_of(optimizer_args={"betas": betas})


def test_a_step_masks_then_mixes_then_learns_at_its_rate() -> None:
    network, reference = network_of(), network_of()
    batch, recipe, weights = batch_of(2), ViewRecipe(None, time_mask=20, freq_mask=16), torch.tensor([0.75, 0.25])
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.5]])
    loss = Stepper(config_of(), network, F.binary_cross_entropy_with_logits, ALONE).step(
        batch, recipe, targets, weights, 0.25
    )

    mel = mask(reference.front_end(batch.waves.float() / 32768), batch.uniforms, recipe)
    mixed = torch.stack([0.75 * mel[0] + 0.25 * mel[1], 0.25 * mel[1] + 0.75 * mel[0]])
    goal = torch.tensor([[0.75, 0.25, 0.125], [0.75, 0.25, 0.125]])
    expected = F.binary_cross_entropy_with_logits(reference.forward_mel(mixed), goal)
    torch.testing.assert_close(loss, expected.detach())
    # Adam's first step moves each weight by the learning rate.
    moved = network.get_parameter("outputlayer.1.bias") - reference.get_parameter("outputlayer.1.bias")
    torch.testing.assert_close(moved.abs(), torch.full((3,), 0.25), rtol=1e-4, atol=0)


def test_a_step_goes_on_from_saved_state_bit_for_bit() -> None:
    recipe, targets = ViewRecipe(None, 20, 16), torch.eye(3)[:2]
    unbroken = Stepper(config_of(), network_of(), F.cross_entropy, ALONE)
    unbroken.step(batch_of(2), recipe, targets, None, 0.01)
    resumed = Stepper(config_of(), network_of(), F.cross_entropy, ALONE)
    resumed.load_state_dict(copy.deepcopy(unbroken.state_dict()))
    losses = [stepper.step(batch_of(2), recipe, targets, None, 0.01) for stepper in (unbroken, resumed)]
    assert torch.equal(*losses)
    for one, two in zip(unbroken.network.state_dict().values(), resumed.network.state_dict().values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("key", "other", "message"),
    [
        ("optimizer", "Adam8bit", "begun with Adam8bit in float32, but here it would be Adam in float32"),
        ("precision", "float16", "begun with Adam in float16, but here it would be Adam in float32"),
    ],
)
def test_a_state_of_other_hardware_is_refused(key: str, other: str, message: str) -> None:
    state = Stepper(config_of(), network_of(), F.cross_entropy, ALONE).state_dict()
    state["kind"][key] = other
    with pytest.raises(TrainingError, match=message):
        Stepper(config_of(), network_of(), F.cross_entropy, ALONE).load_state_dict(state)


def test_a_batch_that_does_not_fit_the_gpu_is_told() -> None:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    with pytest.raises(TrainingError, match="too small for the 2 items of a step; a smaller batch_size"):
        Stepper(config_of(), network_of(), loss, ALONE).step(batch_of(2), NO_VIEW, torch.zeros(2, 3), None, 0.01)


def test_a_scaler_skips_a_step_without_finite_gradients_and_is_saved() -> None:
    """As fp16 has it on a GPU; the scaler itself is the same on a CPU."""

    def stepper_of() -> Stepper:
        stepper = Stepper(config_of(), network_of(), F.binary_cross_entropy_with_logits, ALONE)
        stepper.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return stepper

    stepper, targets = stepper_of(), torch.zeros(2, 3)
    weight = stepper.network.get_parameter("outputlayer.1.weight")
    before = weight.detach().clone()
    stepper.step(batch_of(2), NO_VIEW, targets + torch.inf, None, 0.01)
    assert torch.equal(weight, before)
    assert stepper.scaler.get_scale() == 512
    resumed = stepper_of()
    resumed.load_state_dict(copy.deepcopy(stepper.state_dict()))
    assert resumed.scaler.get_scale() == 512
    loss = stepper.step(batch_of(2), NO_VIEW, targets, None, 0.01)
    assert not torch.equal(weight, before)
    # Adam does not feel the scale, if it was taken back from the gradients: they are those of an unscaled step.
    plain = Stepper(config_of(), network_of(), F.binary_cross_entropy_with_logits, ALONE)
    torch.testing.assert_close(plain.step(batch_of(2), NO_VIEW, targets, None, 0.01), loss)
    torch.testing.assert_close(plain.network.get_parameter("outputlayer.1.weight"), weight)


@pytest.mark.parametrize(("mode", "half"), [("off", False), ("amp", False), ("amp_bf16", True)])
def test_on_a_cpu_only_bf16_is_computed_in_half_precision(mode: Mode, half: bool) -> None:
    seen = []
    network = network_of()
    network.blocks[0].register_forward_hook(lambda module, inputs, out: seen.append(module.mlp.fc1(inputs[0]).dtype))
    stepper = Stepper(config_of(mode=mode), network, F.binary_cross_entropy_with_logits, ALONE)
    loss = stepper.step(batch_of(2), ViewRecipe(None, None, None), torch.zeros(2, 3), None, 0.01)
    assert seen == [torch.bfloat16 if half else torch.float32]
    assert loss.dtype == torch.float32
    assert not stepper.scaler.is_enabled()


def test_a_fresh_batchnorm_starts_from_its_first_batch() -> None:
    network = network_of()
    mel = torch.randn(4, 64, 40) * 5 - 30
    calibrate(network, mel)
    state = network.state_dict()
    torch.testing.assert_close(state["init_bn.1.running_mean"], mel.transpose(0, 1).flatten(1).mean(1))
    torch.testing.assert_close(state["init_bn.1.running_var"], mel.transpose(0, 1).flatten(1).var(1))
    state["init_bn.1.num_batches_tracked"].fill_(1)
    calibrate(network, mel + 7)
    torch.testing.assert_close(network.state_dict()["init_bn.1.running_mean"], mel.mean((0, 2)))


def test_what_does_not_learn_stays_and_so_do_the_statistics() -> None:
    network = network_of()
    network.requires_grad_(False)
    network.outputlayer.requires_grad_(True)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    stepper = Stepper(config_of(), network, F.binary_cross_entropy_with_logits, ALONE)
    stepper.step(batch_of(2), ViewRecipe(None, None, None), torch.zeros(2, 3), None, 0.01)
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed <= {f"outputlayer.{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")}
    assert "outputlayer.1.bias" in changed
