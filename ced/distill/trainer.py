"""The trainer that distillation, fine-tuning and masked pre-training share: first weights, epochs, validation, result.

The order of the data, every random draw and the learning rate are functions of (seed, epoch, step), and a run resumes
at the end of an epoch. So an interrupted run that is resumed ends with the same weights as an uninterrupted one. Under
torchrun each process takes its share of every batch, and a run that torchrun restarts is resumed.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ced.config import TrainerConfig
from ced.distill import experiment
from ced.distill.dataset import Batch, ViewDataset, prefetch, shuffled, weighted
from ced.distill.distributed import World, claim_wait, half_type, job_names, join_processes, lost_process_explained
from ced.distill.evaluate import Evaluation, Validation
from ced.distill.experiment import LAST_NAME, RESULT_NAME, State
from ced.distill.pack_reader import AudioPack
from ced.distill.recorder import Recorder
from ced.distill.step import Objective, Stepper, TrainingBatch, learning_rate
from ced.distill.targets import mixup_weights
from ced.errors import CheckpointError, ConfigError, DownloadError, TrainingError, install_command
from ced.files import claimed
from ced.model import loading
from ced.model.vit import CED
from ced.progress import Progress, silent
from ced.sound.audio import SAMPLE_RATE
from ced.sound.features import frames_of
from ced.sound.labels import ClassTable
from ced.text import quoted

logger = logging.getLogger(__name__)

ORDER, VIEWS, MIXUP, FILL, DECODER = range(5)  # streams of random numbers, one for each purpose
CHECK_EVERY = 100  # steps between two checks of the loss, each of which waits for the GPU


@dataclass(frozen=True, eq=False)
class EpochData:
    """The data of one epoch: chunks with targets, or in masked pre-training with patches to hide."""

    dataset: ViewDataset
    targets: Callable[[NDArray[np.int64], torch.Generator], Tensor] | None = None  # items (b,) -> (b, c)
    hidden: Callable[[int, torch.Generator], Tensor] | None = None  # b -> bool (b, tokens)
    weights: NDArray[np.float64] | None = None  # (n,) how often items are drawn; None: each once


class TrainingData(Protocol):
    """What a network is trained on."""

    def __len__(self) -> int:
        """Return the number of chunks or clips of an epoch."""

    def epoch(self, epoch: int) -> EpochData:
        """Return the data of an epoch (1, 2, ...)."""


@dataclass(frozen=True, eq=False)
class Run:
    """A run that begins or resumes, as one of its processes has it."""

    name: str
    folder: Path | None  # of the experiment to resume; None: a new one
    state: State
    world: World
    job: list[str]  # its names; none without torchrun
    progress: Progress


def begin_run(config: TrainerConfig, *, name: str, resume: Path | None, progress: Progress) -> Run:
    """Join the other processes, check that an experiment can be resumed with a configuration, and read its state.

    An experiment that was begun by the same job of torchrun with the same configuration is resumed by itself.

    Args:
        config: how to train.
        name: of the experiment, the folder above the one named by the time.
        resume: folder of an experiment to resume; None: that of this job, or a new one.
        progress: called after each step and evaluated batch, in the first process.

    Raises:
        TrainingError: `resume` is not an experiment, or its state is damaged.
        ConfigError: a setting differs from that of the experiment.
        ProcessError: the processes of the run cannot join, have other settings, or see another folder.
    """
    world = join_processes()
    world.check_same(experiment.settings_of(config))
    job = job_names(world)
    folder = resume
    if resume is None and job:
        folder = world.broadcast(experiment.find_folder(config, name, job) if world.is_main else None)
        if folder is not None and world.is_main:
            logger.info("this job of torchrun began %s; another --rdzv-id begins a new experiment", folder)
    state = None
    if folder is not None:
        if world.is_main:  # others may not see the folder
            experiment.check_resumable(config, folder)
        world.check_shared(folder)
        state = experiment.load_state(folder)
    state = state or State(world_size=world.size)
    world.check_same({"the last complete epoch": state.epoch})
    if state.finished and world.is_main:
        logger.warning("%s is finished after %d epochs; there is nothing to resume", folder, state.epoch)
    return Run(name, folder, state, world, job, progress if world.is_main else silent)


# First weights, and whether they suit the data -----------------------------------------------------------------------


def initial_network(config: TrainerConfig, labels: ClassTable, needs: Mapping[str, str], progress: Progress) -> CED:
    """Return the network that a configuration names, with its first weights; new ones are drawn from the seed.

    Args:
        config: names the network and its first weights.
        labels: the classes of its output layer.
        needs: fields of `ModelConfig` that the training requires.
        progress: called during a download.

    Raises:
        ConfigError: `model_args` contradicts `needs` or itself.
        CheckpointError: no such model, or weights that do not fit.
        DownloadError: a file is not in the cache and cannot be downloaded.
    """
    for key, needed in needs.items():
        if (given := config.model_args.get(key, needed)) != needed:
            raise ConfigError(f"model_args.{key} is {given!r}; this training needs {needed!r}")
    try:
        with seeded(config.seed):
            return loading.create(
                config.model,
                model_args={**config.model_args, **needs},
                pretrained=config.pretrained,
                labels=labels,
                progress=progress,
            )
    except (CheckpointError, DownloadError) as error:
        if config.pretrained is not False:
            error.hint = error.hint or "--pretrained false starts from random weights"
        raise


def warn_of_splitting(network: CED, samples: int) -> None:
    """Warn if items of `samples` samples are longer than the network's longest input, and so scored in pieces.

    The last piece is padded: of items slightly too long, almost half of the computation is spent on padding.
    """
    frames, piece = frames_of(samples, network.config.hop_size), network.config.target_length
    if frames > piece:
        logger.warning(
            "items of %d frames are split into pieces of %d, which the network scores one by one; with "
            "model_args.target_length %d it scores them whole",
            *(frames, piece, frames),
        )


def warn_of_padding(pack: AudioPack, samples: int) -> None:
    """Warn if more than half of the training items, of `samples` samples each, would be the padding of short clips."""
    lengths = pack.lengths()
    padding = 1 - np.minimum(lengths, samples).mean() / samples
    if padding > 0.5:
        logger.warning(
            "%.0f %% of the training data would be padding: chunk_length is %g s, half of the clips have at most "
            "%.2f s; set chunk_length to about the length of the clips",
            *(100 * padding, samples / SAMPLE_RATE, float(np.median(lengths)) / SAMPLE_RATE),
        )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator, which draws new weights, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


# Training ------------------------------------------------------------------------------------------------------------


class Trainer:
    """Trains a network for the epochs of a run, in one of its processes."""

    def __init__(
        self,
        config: TrainerConfig,
        run: Run,
        network: CED,
        objective: Objective,
        data: TrainingData,
        *,
        validation: Validation | None = None,
        mixup: float | None = None,
        after_epoch: Callable[[int, Path], None] | None = None,
    ) -> None:
        """Set up the training; a new run gets its folder in `fit`.

        Args:
            config: batch size, epochs, optimiser, learning rate, precision, seed.
            run: what `begin_run` returned.
            network: becomes the result; parameters that require gradients are trained.
            objective: the loss, of the network or of a module that contains it.
            data: what to train on.
            validation: how to measure the network between epochs; None: not at all.
            mixup: alpha of Beta(alpha, alpha); None: no mixup.
            after_epoch: called with the number of each epoch and the experiment's folder, in the first process.

        Raises:
            ConfigError: the batch cannot be divided between the processes.
            ProcessError: another process has stopped, or has other data.
        """
        self.config, self.network, self.objective, self.data = config, network, objective, data
        self.validation, self.mixup, self.after_epoch = validation, mixup, after_epoch
        self.run, self.state, self.world, self.progress = run, run.state, run.world, run.progress
        self.share = batch_share(self.world.rank, self.world.size, config.batch_size)
        self.steps = config.epoch_length or math.ceil(len(data) / config.batch_size)  # of an epoch
        self.warmup = config.warmup_iters or round((config.warmup_epochs or 0) * self.steps)
        self.world.check_same({"the number of clips or chunks": len(data)})
        with lost_process_explained():
            self.stepper = Stepper(
                network,
                objective,
                self.world,
                optimizer=config.optimizer,
                optimizer_args=config.optimizer_args,
                mode=config.mode,
                compiled=config.compile,
            )

    def fit(self) -> Path:
        """Train the remaining epochs and write the result; return the experiment's folder, which a new run gets here.

        Raises:
            TrainingError: the loss is not finite, or the run began on other hardware.
            BusyError: another process is training in this experiment.
            ProcessError: another process has stopped, or does not see the experiment's folder.
        """
        folder = self.run.folder or self._create_folder()
        self.state.config = experiment.config_digest(folder)
        with ExitStack() as stack:
            stack.enter_context(lost_process_explained())
            recorder = None
            if self.world.is_main:
                stack.enter_context(claimed(folder / experiment.STATE_NAME, claim_wait()))
                stack.enter_context(experiment.logging_to(folder / self.config.logfile))
            if self.state.epoch:
                self.stepper.load_state_dict(self.state.stepper)
            if self.world.is_main:
                experiment.remove_unkept(folder, self.state)
                self._log_start()
                recorder = Recorder(folder, self.state)
            while not self._is_trained:
                self._fit_epoch(self.state.epoch + 1, folder, recorder)
            if recorder is not None:
                recorder.close()
            self._finish(folder)
        self.world.barrier()
        return folder

    def _create_folder(self) -> Path:
        """Make the folder of a new run, which all processes see."""
        made = experiment.create_folder(self.config, self.run.name, self.run.job) if self.world.is_main else None
        folder: Path = self.world.broadcast(made)
        self.world.check_shared(folder)
        return folder

    @property
    def _is_trained(self) -> bool:
        early_stop = self.validation.early_stop if self.validation else None
        return self.state.epoch >= self.config.epochs or (early_stop is not None and self.state.stale >= early_stop)

    def _fit_epoch(self, epoch: int, folder: Path, recorder: Recorder | None) -> None:
        """Train and validate one epoch; the first process saves and records it."""
        began = time.monotonic()
        loss = self._train(epoch)
        line = {"epoch": epoch, "loss": loss, "lr": self._rate(epoch * self.steps - 1)}
        line |= self._validate(epoch, folder)
        line["seconds"] = round(time.monotonic() - began, 3)
        self.state.epoch = epoch
        self.state.history.append(line)
        if recorder is None:
            return
        if self.after_epoch is not None:
            self.after_epoch(epoch, folder)
        self._save(folder)
        recorder.epoch()
        figures = ", ".join(f"{key} {value:.5g}" for key, value in line.items() if key != "epoch")
        logger.info("epoch %d of %d: %s", epoch, self.config.epochs, figures)

    def _train(self, epoch: int) -> float:
        """Train one epoch and return its mean loss."""
        config, data = self.config, self.data.epoch(epoch)
        seed = [config.seed, ORDER, epoch]
        # The items of each step, of all processes together.
        if data.weights is None:
            items = list(islice(shuffled(len(data.dataset), config.batch_size, seed), self.steps))
        else:
            items = list(weighted(data.weights, config.batch_size, self.steps, seed))
        read = prefetch(data.dataset, [batch[self.share] for batch in items], config.num_workers)
        losses = torch.zeros(self.steps, device=self.world.device)
        for step, chunks in enumerate(read):
            batch = self._batch(data, chunks, items[step], epoch, step)
            losses[step] = self.stepper.step(batch, self._rate((epoch - 1) * self.steps + step))
            if (step + 1) % CHECK_EVERY == 0 or step + 1 == self.steps:
                self._check(losses[: step + 1], epoch)
            self.progress(f"epoch {epoch} of {config.epochs}", step + 1, self.steps)
        finite = losses[losses.isfinite()]
        return float(np.mean(self.world.gather(float(finite.mean()))))

    def _batch(self, data: EpochData, chunks: Batch, items: NDArray[np.int64], epoch: int, step: int) -> TrainingBatch:
        """Return this process's share of a step; random values are drawn for `items`, those of all processes."""
        draws = [self.config.seed, epoch, step]
        generator = torch.Generator().manual_seed(int(_rng(FILL, draws).integers(2**63)))
        targets = hidden = weights = None
        if data.targets is not None:
            targets = data.targets(items, generator)[self.share]
        if data.hidden is not None:
            hidden = data.hidden(len(items), generator)[self.share]
        if self.mixup is not None:
            weights = mixup_weights(len(items), self.mixup, _rng(MIXUP, draws))[self.share]
        return TrainingBatch(chunks, data.dataset.recipe, targets, hidden, weights)

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

    def _check(self, losses: Tensor, epoch: int) -> None:
        """Stop on a loss that is not finite; with fp16 the scaler skips such steps, unless all are."""
        finite = losses.isfinite()
        if finite.all() or (self.stepper.scaler.is_enabled() and finite.any()):
            return
        step = int((~finite).nonzero()[0])
        raise TrainingError(
            f"the loss is {float(losses[step])} at step {step + 1} of epoch {epoch}; a lower optimizer_args.lr, larger "
            "warmup_iters or mode off may help, if the audio and the targets are right"
        )

    def _validate(self, epoch: int, folder: Path) -> dict[str, float]:
        """Evaluate the network if the epoch is one to validate; keep it if it is among the best."""
        if self.validation is None or (epoch % self.validation.every and epoch != self.config.epochs):
            return {}
        found = self._evaluate(self.validation, self.network)
        file = self.state.add_validation(found.map, epoch, self.validation.n_saved)
        if file is not None and self.world.is_main:
            experiment.save_network(folder / file, self.network)
        return {"mAP": found.map} | ({} if found.accuracy is None else {"accuracy": found.accuracy})

    def _evaluate(self, validation: Validation, network: CED) -> Evaluation:
        return validation.evaluator(experiment.as_tagger(network), world=self.world, progress=self.progress)

    def _save(self, folder: Path) -> None:
        """Write the state at the end of an epoch, then remove networks that are no longer among the best."""
        self.state.stepper = self.stepper.state_dict()
        experiment.save_network(folder / LAST_NAME, self.network)
        experiment.save_state(folder, self.state)
        experiment.remove_unkept(folder, self.state)

    def _finish(self, folder: Path) -> None:
        """Make the result from the kept networks, if there are any, and mark the run as finished."""
        if self.validation is not None and self.state.kept:
            self._make_result(self.validation, folder)
        self.state.finished = True
        if self.world.is_main:
            experiment.save_state(folder, self.state)

    def _make_result(self, validation: Validation, folder: Path) -> None:
        """Write and evaluate the mean of the kept networks, or the best one."""
        if self.world.is_main:
            experiment.make_result(folder, self.state, validation.average)
        self.world.barrier()
        network = loading.load_model(folder / RESULT_NAME).to(self.world.device)
        found = self._evaluate(validation, network)
        if self.world.is_main:
            kept = len(self.state.kept)
            what = f"the mean of the best {kept}" if validation.average and kept > 1 else "the best"
            logger.info("%s is %s: %s", RESULT_NAME, what, found.summary)

    def _log_start(self) -> None:
        """Log what is about to be trained, and warn where the settings cannot be followed or do not suit the run."""
        state, config, total = self.state, self.config, self.config.epochs * self.steps
        if state.epoch:
            logger.info("resuming after epoch %d", state.epoch)
        if state.world_size != self.world.size:
            logger.warning("begun with %d processes, resumed with %d", state.world_size, self.world.size)
        if half_type(config.mode, self.world.device) is None and config.mode == "amp":
            logger.warning("mode amp needs a GPU; computing in fp32")
        if config.optimizer == "Adam8bit" and type(self.stepper.optimizer) is torch.optim.Adam:
            logger.warning("Adam8bit needs a CUDA GPU and bitsandbytes (%s); using Adam", install_command("gpu"))
        if self.warmup >= total:
            logger.warning(
                "the warm-up of %d steps is as long as the run of %d, so that the learning rate never reaches lr; "
                "set warmup_iters to %d, a tenth of the run",
                *(self.warmup, total, total // 10),
            )
        parameters = sum(parameter.numel() for parameter in self.objective.learner.parameters())
        logger.info(
            "%s: %s parameters, %d items, %d epochs of %d steps, %d process(es) on %s",
            *(config.model, f"{parameters:,}", len(self.data), config.epochs, self.steps),
            *(self.world.size, self.world.device),
        )
        if self.validation is not None and (missing := self.validation.evaluator.missing):
            table = self.validation.evaluator.table
            logger.info("no clip of %s has: %s (left out of mAP)", table, ", ".join(map(quoted, missing)))


def batch_share(rank: int, size: int, batch_size: int) -> NDArray[np.int64]:
    """Return the places in a batch that one of `size` processes computes: a run from its front, and its mirror image.

    So a process has both items of each mixup pair, which are equally far from the two ends of the batch.

    Raises:
        ConfigError: the batch cannot be divided evenly.
    """
    if size == 1:
        return np.arange(batch_size)
    if batch_size % (2 * size):
        raise ConfigError(f"batch_size is {batch_size}; for {size} processes it must be a multiple of {2 * size}")
    half = batch_size // (2 * size)
    front = np.arange(rank * half, (rank + 1) * half)
    return np.concatenate([front, batch_size - 1 - front[::-1]])


def _rng(stream: int, draws: list[int]) -> np.random.Generator:
    seed, *place = draws
    return np.random.default_rng([seed, stream, *place])
