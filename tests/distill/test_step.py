from typing import Any

import pytest
import torch

from ced.config import TrainConfig, check
from ced.distill.step import learning_rate, make_optimizer


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
    values = {"train_data": "t", "logitspath": "l", "model": "ced_tiny", "optimizer": name, "optimizer_args": arguments}
    config = check(TrainConfig, values, "test")
    optimizer = make_optimizer(config, [torch.nn.Parameter(torch.ones(1))], torch.device("cpu"))
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.01, 0.1, (0.8, 0.9), 1e-6)
