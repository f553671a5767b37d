# SPDX-License-Identifier: Apache-2.0
"""What both DeepSpeed engines share: start, save and load, the numbers of a step, and the guard that refuses a step that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from megatron import deepspeed_private as private
from megatron import fault_injection
from megatron.checkpoint.formats.optimizer_files import RECORD, recorded
from megatron.checkpoint.formats.torch_file import canonical_name, read_torch_file
from megatron.checkpoint.steps.write import RankFileWriter
from megatron.engine.base import LocalShards
from megatron.engine.deepspeed_mpu import counted_here, grid_of, mark_split
from megatron.engine.reshard import NUMBERS, OTHER_FIX, CheckpointLayout, load_resharded, plain, stored_layout
from megatron.engine.shards import local_shards_of
from megatron.errors import CheckpointError, TrainingError
from megatron.log import get_logger
from megatron.model.spec import ModelSpec
from megatron.mpu.collectives import of_all_ranks
from megatron.mpu.comm import all_reduce
from megatron.mpu.groups import Group, Groups
from megatron.optim.clipping import GradientClipper
from megatron.optim.schedules import LRScheduler

log = get_logger(__name__)


class SafeCheckpointEngine(private.checkpoint_engine_base()):  # type: ignore[misc]
    """Hands what DeepSpeed wants written to a RankFileWriter, and reads without running code found in a file.

    It raises nothing: while one rank had an error, the others would wait for it in DeepSpeed's barriers.
    optimizer: whether the optimizer's state is written
    writing:   where files go to; set while a checkpoint is saved
    """

    def __init__(self, config: Any, *, optimizer: bool = True) -> None:
        super().__init__(config)
        self._optimizer = optimizer
        self.writing: RankFileWriter | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """A folder of the checkpoint."""
        try:
            super().makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self._target().fail(path, error)

    def save(self, state_dict: Any, path: str) -> None:
        """One file of a checkpoint."""
        if self._optimizer:
            self._target().add(state_dict, Path(path))
        elif private.is_optimizer_file(Path(path)):
            if (weights := private.weights_alone(state_dict)) is not None:
                self._target().add(weights, Path(path))
        else:
            self._target().add({**state_dict, "optimizer": None} if "optimizer" in state_dict else state_dict, Path(path))

    def _target(self) -> RankFileWriter:
        if self.writing is None:
            raise TrainingError("DeepSpeed wrote a checkpoint by itself", fix="save through the engine")
        return self.writing

    def load(self, path: str, map_location: Any = None) -> Any:
        """Tensors and plain data of one file."""
        return read_torch_file(Path(path), deepspeed_types=True)


class UpdateGuard:
    """Decides once per step, on all ranks alike, and keeps a torch optimizer from updating when the answer is no.

    A step without gradients changes nothing in an optimizer, neither weights nor moments nor step counts. So a refused one is shown none,
    and DeepSpeed, which drives it, goes on as after any other step: what it copies and gathers then is what was there before.

    optimizer: the innermost
    gradients: whether those decide, too; not where a loss scale makes them overflow on purpose
    refused:   what was not finite in the last step, and on which rank first; "" = the update was made
    """

    def __init__(self, optimizer: torch.optim.Optimizer, world: Group, *, gradients: bool = True) -> None:
        self._world = world
        self._gradients = gradients
        self._loss: Tensor | None = None
        self._hidden: list[tuple[nn.Parameter, Tensor]] = []
        self.refused = ""
        optimizer.register_step_pre_hook(self._hide)
        optimizer.register_step_post_hook(self._give_back)

    def see(self, loss: Tensor) -> None:
        """The loss of a micro batch of the step under way."""
        loss = loss.detach().float()
        self._loss = loss if self._loss is None else self._loss + loss

    def decide(self, parameters: Sequence[nn.Parameter], shards: LocalShards, device: torch.device) -> None:
        """Look at this step, whose gradients are complete. All ranks call it."""
        loss, self._loss = self._loss, None
        own = torch.zeros(2, device=device)
        if loss is not None:
            own[0] = ~loss.isfinite()
        if self._gradients:
            own[1] = ~self._norms(parameters, shards, device).isfinite().all()
        # The largest of these numbers names the first rank.
        first = all_reduce(own * (self._world.size - self._world.rank), self._world, maximum=True).tolist()
        names = zip(("loss", "gradient"), first, strict=True)
        self.refused = ", ".join(f"{name} on rank {self._world.size - int(number)}" for name, number in names if number)

    def _norms(self, parameters: Sequence[nn.Parameter], shards: LocalShards, device: torch.device) -> Tensor:
        """L2 norm of this rank's shard of every gradient, and of all of them. [number of shards + 1]"""
        found = [grad for p in parameters if (grad := shards.gradient(p)) is not None and grad.numel()]
        if not found:
            return torch.zeros(1, device=device)
        norms = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float32).to(device) for grad in found])
        return torch.cat([norms, norms.norm().reshape(1)])

    def _hide(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self.refused:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._hidden.append((parameter, parameter.grad))
                    parameter.grad = None

    def _give_back(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # With the optimizer on the host, DeepSpeed keeps one buffer per gradient for the whole run.
        for parameter, grad in self._hidden:
            parameter.grad = grad
        self._hidden = []


class Runner:
    """A `deepspeed` engine around a model, an optimizer and a schedule.

    A plain torch optimizer (float32 without ZeRO) is clipped by DeepSpeed without telling the norm; a step pre-hook does both here.
    pipelined:      the model is a pipeline module
    save_optimizer: whether checkpoints hold the optimizer's state
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        config: Mapping[str, Any],
        groups: Groups,
        *,
        pipelined: bool = False,
        save_optimizer: bool = True,
    ) -> None:
        config = dict(config)
        self.groups = groups
        self.schedule = schedule
        self._watchers: list[Callable[[], None]] = []
        self._clipper: GradientClipper | None = None
        if _is_plain(config):
            limit, counted = float(config.get("gradient_clipping", 0.0)), counted_here(groups.tp)
            self._clipper = GradientClipper(model.parameters(), limit, over=(groups.tp, groups.pp), counted=counted)
            optimizer.register_step_pre_hook(self._clipper)
            config["gradient_clipping"] = 0.0
        # After the clipper, which measures the norm that was refused.
        self.guard = UpdateGuard(optimizer, groups.world, gradients=not bool((config.get("fp16") or {}).get("enabled")))
        mark_split(model)
        self._record = _record_of(model, optimizer)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=config,
            dist_init_required=False,
            mpu=None if pipelined else grid_of(groups),  # the pipeline engine takes its module's
        )
        private.forget_rehearsal(self.optimizer)
        make = partial(SafeCheckpointEngine, optimizer=save_optimizer)
        self._files: SafeCheckpointEngine = private.set_checkpoint_engine(self.deepspeed, make)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        private.intercept_update(self.deepspeed, self._update)
        if fault_injection.planned() and self._parameters:
            # Site `gradient`: of the first parameter, of one micro batch, before it is summed over ranks.
            self._parameters[0].register_hook(lambda grad: fault_injection.changed("gradient", grad))

    def watch(self, look: Callable[[], None]) -> None:
        """Have `look` called before each update, in every layout: when gradients are complete and not yet clipped."""
        self._watchers.append(look)

    def _update(self, make_update: Callable[[], None]) -> None:
        """Stands between DeepSpeed's backward passes and its update."""
        shards = self.local_shards()
        if fault_injection.planned():
            self._disturb_reduced(shards)
        for look in self._watchers:
            look()
        self.guard.decide(self._parameters, shards, self.deepspeed.device)
        schedule_step = self.schedule.num_iters
        with private.overflow_checked(self.optimizer, bool(self.guard.refused)):
            make_update()
        if self.guard.refused:
            # DeepSpeed moves the schedule, or does not, by what it noticed itself; a step without an update is none to the schedule.
            self.schedule.seek(schedule_step)
        if fault_injection.planned() and self._parameters and self._parameters[0].numel():
            with torch.no_grad():
                self._parameters[0].copy_(fault_injection.changed("weight", self._parameters[0]))

    def _disturb_reduced(self, shards: LocalShards) -> None:
        """Site `reduced`: of the first parameter, after it was summed over ranks. Reaches gradients that every rank has whole."""
        grad = shards.gradient(self._parameters[0]) if self._parameters and not shards.sharded else None
        if grad is not None:
            grad.copy_(fault_injection.changed("reduced", grad))

    def local_shards(self) -> LocalShards:
        """What of each parameter is on this rank."""
        return local_shards_of(self.deepspeed, lambda: self.loss_scale or 1.0, self.groups.replicas.rank)

    @property
    def learning_rate(self) -> float:
        """Of parameter group 0, for the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def grad_norm(self) -> Tensor | None:
        """L2 norm of the last step's gradients before clipping."""
        if self._clipper is not None:
            return self._clipper.norm
        norm = self.deepspeed.get_global_grad_norm()
        return norm if norm is None or isinstance(norm, Tensor) else torch.tensor(float(norm))

    @property
    def loss_scale(self) -> float | None:
        """The loss scale, fp16 only."""
        return private.loss_scale_of(self.deepspeed)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step made no update (overflow of fp16, or `not_finite`)."""
        return bool(self.guard.refused) or not self.deepspeed.was_step_applied()

    @property
    def not_finite(self) -> str:
        """What of the last step was not finite, so that no update was made; "" where the loss scale alone was too large."""
        unseen = not self.deepspeed.fp16_enabled() and not self.deepspeed.was_step_applied()
        return self.guard.refused or ("gradient norm" if unseen else "")

    def save(self, directory: Path, tag: str, client_state: Mapping[str, Any], writing: RankFileWriter) -> None:
        """Hand over everything that belongs into directory/tag; `writing` knows when it is there, and what failed."""
        self._files.writing = writing
        try:
            self.deepspeed.save_checkpoint(str(directory), tag=tag, client_state={**client_state, RECORD: self.record()}, save_latest=False)
        finally:
            self._files.writing = None

    def load(self, directory: Path, tag: str, spec: ModelSpec) -> dict[str, Any]:
        """Read weights, optimizer and schedule, of any layout; returns the client state.

        Raises CheckpointError when the folder does not fit this model or optimizer.
        """
        folder = directory / tag
        if not self._fits(folder):
            stored, ours = stored_layout(folder), self._layout()
            log.info("the checkpoint was written at: %s; this run has: %s; its weights and optimizer are resharded", stored, ours)
            state = load_resharded(self.deepspeed, self.groups, folder, spec)
            if state.get("lr_scheduler") is not None:
                self.schedule.load_state_dict(state["lr_scheduler"])
            return state
        configured = [{key: group[key] for key in _NUMBERS if key in group} for group in self.optimizer.param_groups]
        kinds = [set(group) for group in self.optimizer.param_groups]
        try:
            path, client_state = self.deepspeed.load_checkpoint(str(directory), tag=tag, load_module_strict=True)
        except (RuntimeError, KeyError, ValueError, AssertionError, FileNotFoundError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"weights and optimizer cannot be resumed: {error}",
                where=str(folder),
                fix="resume with the layout it was written with, or take the weights alone with `no_load_optim: true` or `finetune: true`",
            ) from error
        if path is None:
            raise CheckpointError("DeepSpeed found no checkpoint", where=str(folder), fix="check that all files were copied")
        groups = zip(kinds, self.optimizer.param_groups, strict=False)
        lacking = sorted({key for kind, group in groups for key in kind if key not in group} - {"name"})
        if lacking:
            raise CheckpointError(
                f"the checkpoint is of another optimizer: it has no {', '.join(lacking)}", where=str(folder), fix=OTHER_FIX
            )
        self._restore_numbers(configured)
        # ZeRO loads the optimizer, with the rate it was saved with, after the schedule.
        self.schedule.apply()
        return dict(client_state)

    def _layout(self) -> CheckpointLayout:
        engine = self.deepspeed
        return CheckpointLayout(
            pipelined=bool(engine.pipeline_parallelism),
            partitions=self.groups.replicas.size if engine.zero_optimization() else 0,
            model_ranks=self.groups.tp.size * self.groups.pp.size,
            tensor_ranks=self.groups.tp.size,
            sharded=engine.zero_optimization_stage() == 3,
        )

    def record(self) -> dict[str, Any]:
        """How the optimizer is kept, and over which parameters; see RECORD."""
        engine = self.deepspeed
        precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
        return {"form": f"{type(self.optimizer).__name__} {precision}", **self._record}

    def _fits(self, folder: Path) -> bool:
        """Whether DeepSpeed's own loader can read the folder: on every rank its files are of the same form and order."""
        fits = stored_layout(folder) == self._layout()
        record = recorded(folder, private.model_rank_of(self.deepspeed)) if fits else {}
        ours = self.record()
        fits = fits and all(record.get(key, ours[key]) == ours[key] for key in ("form", "groups"))
        return all(of_all_ranks(fits, self.groups.world))

    def _restore_numbers(self, configured: list[dict[str, Any]]) -> None:
        """The configuration's optimizer numbers win over the checkpoint's; every change is said once."""
        changed = {}
        for group, numbers in zip(self.optimizer.param_groups, configured, strict=False):
            for key, value in numbers.items():
                before = group.get(key, value)
                if plain(before) != plain(value):
                    changed[key] = (before, value)
                group[key] = value
        for key, (before, value) in changed.items():
            log.warning("optimizer %s was %s in the checkpoint and is %s now", key, before, value)


# Optimizer numbers a configuration gives and torch would silently take from a checkpoint.
_NUMBERS = (*NUMBERS, "lr_mult")


def _record_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    names = {id(parameter): canonical_name(name) for name, parameter in model.named_parameters()}
    return {"kind": type(optimizer).__name__, "groups": [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]}


def _is_plain(config: Mapping[str, Any]) -> bool:
    low_precision = any(bool((config.get(key) or {}).get("enabled")) for key in ("fp16", "bf16"))
    return not low_precision and int((config.get("zero_optimization") or {}).get("stage", 0)) == 0
