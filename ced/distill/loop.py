"""The training loop that distilling, fine-tuning and pre-training share.

The data order, every random draw and the learning rate are functions of (seed, epoch, step), and an epoch is the
unit of resuming: so an interrupted run that goes on ends with the weights of an unbroken one. Under torchrun each
process takes its share of every batch.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ced.config import LoopConfig
from ced.distill import experiment
from ced.distill.dataset import ViewDataset, drawn, prefetch, shuffled
from ced.distill.distributed import World, join
from ced.distill.evaluate import Evaluation, Validation
from ced.distill.experiment import LAST_NAME, RESULT_NAME, State
from ced.distill.precision import half_type
from ced.distill.recorder import Recorder
from ced.distill.step import Loss, Stepper, learning_rate
from ced.distill.targets import mixup_weights
from ced.errors import ConfigError, TrainingError, install_command
from ced.files import claimed
from ced.model import loading
from ced.model.vit import CED
from ced.progress import Progress, silent
from ced.text import quoted

logger = logging.getLogger(__name__)

ORDER, VIEWS, MIXUP, FILL, DECODER = range(5)  # streams of random numbers, one for each purpose
CHECK_EVERY = 100  # steps between looks at the loss; each makes a GPU wait


@dataclass(frozen=True, eq=False)
class EpochData:
    """The data of one epoch."""

    dataset: ViewDataset
    targets: Callable[[NDArray[np.int64], torch.Generator], Tensor]  # items (b,), for what is random -> (b, c)
    weights: NDArray[np.float64] | None = None  # (n,) how often items are drawn; None: each once


@dataclass(frozen=True, eq=False)
class Task:
    """What is to be learned: here distilling, fine-tuning and pre-training differ."""

    network: CED  # the result; parameters that require gradients learn
    items: int  # chunks or clips that one pass over the data has
    epoch: Callable[[int], EpochData]  # epochs count from 1
    loss: Loss
    validation: Validation | None = None
    mixup: float | None = None  # alpha of Beta(alpha, alpha)
    learner: nn.Module | None = None  # what learns if that is more than the network, see `Stepper`
    after_epoch: Callable[[int, Path], None] | None = None  # told of its number and the folder, in the first process


def run(
    config: LoopConfig,
    prepare: Callable[[], Task],
    *,
    name: str,
    resume: Path | None = None,
    progress: Progress = silent,
) -> Path:
    """Train until the end, alone or as one of torchrun's processes.

    Args:
        config: how to train.
        prepare: makes the task once the processes have joined.
        name: of the experiment, the folder above its time stamp.
        resume: the folder of an experiment that goes on instead of a new one.
        progress: told of steps and evaluated batches, in the first process.

    Returns:
        The experiment's folder; a finished one is left as it is.

    Raises:
        TrainingError: the loss is no longer finite, or `resume` cannot go on.
        ConfigError: the configuration contradicts itself, the data, or the experiment to resume.
        BusyError: another process is training in this experiment.
    """
    if resume is not None:
        experiment.check_resumable(config, resume, config.command)
    world = join()
    state = (experiment.load_state(resume) if resume else None) or State(world_size=world.size)
    if resume and state.finished:
        if world.is_main:
            logger.warning("%s is finished after %d epochs; there is nothing to resume", resume, state.epoch)
        return resume
    task = prepare()
    share(world.rank, world.size, config.batch_size)  # refuses before a folder is made
    folder: Path = resume or world.broadcast(experiment.create(config, name) if world.is_main else None)
    state.config = experiment.config_digest(folder)
    with ExitStack() as stack:
        if world.is_main:
            stack.enter_context(claimed(folder / experiment.STATE_NAME))
            stack.enter_context(experiment.logging_to(folder / config.logfile))
        Trainer(config, task, folder, state, world, progress if world.is_main else silent).run()
    world.barrier()
    return folder


def share(rank: int, size: int, batch_size: int) -> NDArray[np.int64]:
    """Return the places of a batch that are a process's own: a run from its front and the same from its back.

    So a process has each item's mixup partner, the one as far from the other end.

    Raises:
        ConfigError: the batch cannot be shared out evenly.
    """
    if size == 1:
        return np.arange(batch_size)
    if batch_size % (2 * size):
        raise ConfigError(f"batch_size is {batch_size}; for {size} processes it must be a multiple of {2 * size}")
    half = batch_size // (2 * size)
    front = np.arange(rank * half, (rank + 1) * half)
    return np.concatenate([front, batch_size - 1 - front[::-1]])


class Trainer:
    """One run in one process: a network on its way through the epochs."""

    def __init__(
        self, config: LoopConfig, task: Task, folder: Path, state: State, world: World, progress: Progress
    ) -> None:
        self.config, self.task, self.folder, self.state = config, task, folder, state
        self.world, self.progress = world, progress
        self.mine = share(world.rank, world.size, config.batch_size)
        self.steps = config.epoch_length or math.ceil(task.items / config.batch_size)  # an epoch
        self.warmup = config.warmup_iters or round((config.warmup_epochs or 0) * self.steps)
        self.network = task.network
        self.stepper = Stepper(config, task.network, task.loss, world, task.learner)

    def run(self) -> None:
        """Train the epochs that are left, and make the result."""
        self._begin()
        recorder = Recorder(self.folder, self.state) if self.world.is_main else None
        while not self._is_trained:
            epoch, began = self.state.epoch + 1, time.monotonic()
            loss = self._train(self.task.epoch(epoch), epoch)
            line = {"epoch": epoch, "loss": loss, "lr": self._rate(epoch * self.steps - 1)}
            line |= self._validate(epoch)
            line["seconds"] = round(time.monotonic() - began, 3)
            self.state.epoch = epoch
            self.state.history.append(line)
            if recorder is not None:
                if self.task.after_epoch is not None:
                    self.task.after_epoch(epoch, self.folder)
                self._save()
                recorder.epoch()
                said = ", ".join(f"{key} {value:.5g}" for key, value in line.items() if key != "epoch")
                logger.info("epoch %d of %d: %s", epoch, self.config.epochs, said)
        if recorder is not None:
            recorder.close()
        self._finish()

    @property
    def _is_trained(self) -> bool:
        early_stop = self.task.validation.config.early_stop if self.task.validation else None
        return self.state.epoch >= self.config.epochs or (early_stop is not None and self.state.stale >= early_stop)

    def _begin(self) -> None:
        """Take up the state of an interrupted run, and say what is about to happen."""
        state, config = self.state, self.config
        if state.epoch:
            self.stepper.load_state_dict(state.stepper)
        if not self.world.is_main:
            return
        experiment.remove_unkept(self.folder, state)
        if state.epoch:
            logger.info("resuming after epoch %d", state.epoch)
        if state.world_size != self.world.size:
            logger.warning("begun with %d processes, resumed with %d", state.world_size, self.world.size)
        if half_type(config.mode, self.world.device) is None and config.mode == "amp":
            logger.warning("mode amp needs a GPU; computing in fp32")
        if config.optimizer == "Adam8bit" and type(self.stepper.optimizer) is torch.optim.Adam:
            logger.warning("Adam8bit needs a CUDA GPU and bitsandbytes (%s); using Adam", install_command("gpu"))
        if self.warmup >= config.epochs * self.steps:
            total = config.epochs * self.steps
            logger.warning(
                "the warm-up of %d steps is as long as the run of %d, so that the learning rate never reaches lr; "
                "set warmup_iters to %d, a tenth of the run",
                *(self.warmup, total, total // 10),
            )
        parameters = sum(parameter.numel() for parameter in (self.task.learner or self.network).parameters())
        logger.info(
            "%s: %s parameters, %d items, %d epochs of %d steps, %d process(es) on %s",
            *(config.model, f"{parameters:,}", self.task.items, config.epochs, self.steps),
            *(self.world.size, self.world.device),
        )
        if (validation := self.task.validation) and (missing := validation.evaluator.missing):
            table = validation.config.eval_data
            logger.info("no clip of %s has: %s (left out of mAP)", table, ", ".join(map(quoted, missing)))

    def _rate(self, step: int) -> float:
        config = self.config
        return learning_rate(
            step,
            peak=config.optimizer_args.lr,
            warmup=self.warmup,
            total=config.epochs * self.steps,
            decay_frac=config.decay_frac,
            cosine=config.use_scheduler,
        )

    def _train(self, data: EpochData, epoch: int) -> float:
        """Train one epoch and return its mean loss."""
        config, task = self.config, f"epoch {epoch} of {self.config.epochs}"
        seed = [config.seed, ORDER, epoch]
        # The items of each step, of all processes together.
        if data.weights is None:
            items = list(islice(shuffled(len(data.dataset), config.batch_size, seed), self.steps))
        else:
            items = list(drawn(data.weights, config.batch_size, self.steps, seed))
        batches = prefetch(data.dataset, [batch[self.mine] for batch in items], config.num_workers)
        losses = torch.zeros(self.steps, device=self.world.device)
        for step, batch in enumerate(batches):
            draws = [config.seed, epoch, step]
            generator = torch.Generator().manual_seed(int(_rng(FILL, draws).integers(2**63)))
            targets = data.targets(items[step], generator)[self.mine]
            weights = None
            if self.task.mixup is not None:
                weights = mixup_weights(config.batch_size, self.task.mixup, _rng(MIXUP, draws))[self.mine]
            rate = self._rate((epoch - 1) * self.steps + step)
            losses[step] = self.stepper.step(batch, data.dataset.recipe, targets, weights, rate)
            if (step + 1) % CHECK_EVERY == 0 or step + 1 == self.steps:
                self._check(losses[: step + 1], epoch)
            self.progress(task, step + 1, self.steps)
        finite = losses[losses.isfinite()]
        return float(np.mean(self.world.gather(float(finite.mean()))))

    def _check(self, losses: Tensor, epoch: int) -> None:
        """Refuse to go on with a loss that is not finite; the scaler of fp16 skips such steps, unless all are."""
        finite = losses.isfinite()
        if finite.all() or (self.stepper.scaler.is_enabled() and finite.any()):
            return
        step = int((~finite).nonzero()[0])
        raise TrainingError(
            f"the loss is {float(losses[step])} at step {step + 1} of epoch {epoch}; a lower optimizer_args.lr, larger "
            "warmup_iters or mode off may help, if the audio and the targets are right"
        )

    def _validate(self, epoch: int) -> dict[str, float]:
        """Evaluate the network if it is time to, keep it if it is among the best, and return what to record."""
        validation = self.task.validation
        if validation is None or (epoch % validation.config.valid_every and epoch != self.config.epochs):
            return {}
        found = self._evaluate(validation, self.network)
        file = self.state.rank(found.map, epoch, validation.config.n_saved)
        if file is not None and self.world.is_main:
            experiment.save_network(self.folder / file, self.network)
        return {"mAP": found.map} | ({} if found.accuracy is None else {"accuracy": found.accuracy})

    def _evaluate(self, validation: Validation, network: CED) -> Evaluation:
        return validation.evaluator(experiment.as_tagger(network), world=self.world, progress=self.progress)

    def _save(self) -> None:
        """Write the end of an epoch; networks that are no longer kept go once nothing needs them."""
        state = self.state
        state.stepper = self.stepper.state_dict()
        experiment.save_network(self.folder / LAST_NAME, self.network)
        experiment.save_state(self.folder, state)
        experiment.remove_unkept(self.folder, state)

    def _finish(self) -> None:
        """Make the result, if networks were kept, and note that nothing is left to do."""
        if self.task.validation is not None and self.state.kept:
            self._make_result(self.task.validation)
        self.state.finished = True
        if self.world.is_main:
            experiment.save_state(self.folder, self.state)

    def _make_result(self, validation: Validation) -> None:
        """Make the result of the kept networks, and say how good it is."""
        average = validation.config.average
        if self.world.is_main:
            experiment.make_result(self.folder, self.state, average)
        self.world.barrier()
        network = loading.load_model(self.folder / RESULT_NAME).to(self.world.device)
        found = self._evaluate(validation, network)
        if self.world.is_main:
            kept = len(self.state.kept)
            what = f"the mean of the best {kept}" if average and kept > 1 else "the best"
            logger.info("%s is %s: %s", RESULT_NAME, what, found.summary)


def _rng(stream: int, draws: list[int]) -> np.random.Generator:
    seed, *place = draws
    return np.random.default_rng([seed, stream, *place])
