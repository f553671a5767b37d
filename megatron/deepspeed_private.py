# SPDX-License-Identifier: Apache-2.0
"""Every place where DeepSpeed's inner parts are touched; tests/megatron/test_deepspeed_private.py says what is expected of each.

Public functions (initialize, train_batch, zero.Init, ...) are called where they are needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron.log import get_logger

log = get_logger(__name__)

SPLIT = "tensor_model_parallel"
"""Attribute by which DeepSpeed knows a parameter of which every tensor rank has a part of its own."""

TIED_AGAIN = "ds_pipe_replicated"
"""Attribute that DeepSpeed sets on a parameter that an earlier pipeline stage has, too."""

# ---- start -------------------------------------------------------------------------------------------------------


def configure_start(device: torch.device) -> None:
    """No compilation at start-up, and no chatter below WARNING. After the import of deepspeed and before its first call."""
    import deepspeed

    debug = log.isEnabledFor(logging.DEBUG)
    logging.getLogger("DeepSpeed").setLevel(logging.DEBUG if debug else logging.WARNING)
    # Its bfloat16 optimizer prints the memory in use five times, asked or not.
    if not debug:
        deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
    # The shared-memory collective is compiled when the process group starts, a minute of work that gloo does without.
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


# ---- a step ------------------------------------------------------------------------------------------------------


def intercept_update(engine: Any, around: Callable[[Callable[[], None]], None]) -> None:
    """Have `around` called in place of each optimizer update, with the update as its argument, when gradients are complete."""
    update = engine._take_model_step
    engine._take_model_step = lambda lr_kwargs: around(lambda: update(lr_kwargs))


def begin_backward(engine: Any) -> None:
    """What DeepSpeed does when a backward pass begins; among it, 16-bit gradients of the micro batch before are cleared.

    DeepSpeed hangs it on the tensors that the model returns. The last stage of a pipeline returns a handle, so its loss calls this.
    """
    engine._backward_prologue()


def set_micro_batches(engine: Any, count: int) -> None:
    """How many micro batches the next step has."""
    if engine.gradient_accumulation_steps() == count:
        return
    engine.set_train_batch_size(count * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)
    # ZeRO 1 and 2 with the optimizer on the host look at it to know where a gradient is complete.
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = count


@contextmanager
def overflow_checked(optimizer: Any, refused: bool) -> Iterator[None]:
    """ZeRO 1 and 2 do not check float32 gradients, and bring Muon's momentum up to date before the optimizer is asked."""
    configured = getattr(optimizer, "check_grad_overflow", None)
    if not refused or configured is None:
        yield
        return
    optimizer.check_grad_overflow = True
    try:
        yield
    finally:
        optimizer.check_grad_overflow = configured


def loss_scale_of(engine: Any) -> float | None:
    """The loss scale, fp16 only."""
    return float(engine.optimizer.cur_scale) if engine.fp16_enabled() and hasattr(engine.optimizer, "cur_scale") else None


def loss_scaler_of(outer: Any) -> Any:
    """The dynamic fp16 loss scaler, wherever this optimizer keeps its own; None where it has none."""
    return getattr(outer, "loss_scaler", None) or getattr(outer, "loss_scale_config", None)


def cpu_adam_parts() -> tuple[bool, Any, Any]:
    """Whether the operator of its Adam for CPUs was compiled at installation, the optimizer's class, and what compiles the operator."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder

    return bool(installed_ops.get("cpu_adam", False)), DeepSpeedCPUAdam, CPUAdamBuilder()


def muon_class() -> Any:
    """DeepSpeed's Muon, which ZeRO knows how to run."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    return MuonWithAuxAdam


# ---- pipeline stages ---------------------------------------------------------------------------------------------


def stage_layers(stage: Any) -> list[Any]:
    """The layers of this stage, in order."""
    return list(stage.forward_funcs)


def count_micro_batch(stage: Any) -> None:
    """Tell the module that one more micro batch has gone through it."""
    stage.micro_offset += 1


# ---- where parameters and optimizer state lie --------------------------------------------------------------------


def entries_of(parameter: nn.Parameter) -> int:
    """Number of entries, also of a parameter that ZeRO-3 has partitioned."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def is_partitioned(tensor: Any) -> bool:
    """Whether ZeRO-3 has partitioned it."""
    return hasattr(tensor, "ds_id")


def is_tied_again(parameter: nn.Parameter) -> bool:
    """Whether an earlier pipeline stage has the parameter, too."""
    return bool(getattr(parameter, TIED_AGAIN, False))


def inner_optimizer(outer: Any) -> Any:
    """The torch optimizer within DeepSpeed's, or itself."""
    return getattr(outer, "optimizer", outer)


def copies_of(outer: Any) -> dict[nn.Parameter, nn.Parameter]:
    """16-bit parameter -> float32 copy, of DeepSpeed's optimizer for 16 bits without ZeRO; empty for all others."""
    if not _is_unfused(outer):
        return {}
    pairs = zip(outer.fp16_groups, outer.fp32_groups, strict=True)
    return {half: copy for halves, wholes in pairs for half, copy in zip(halves, wholes, strict=True)}


def forget_rehearsal(outer: Any) -> None:
    """Without ZeRO, DeepSpeed's 16-bit optimizer makes its state by a step on zero gradients, which Adam's bias correction counts."""
    if _is_unfused(outer):
        outer.optimizer.state.clear()


def _is_unfused(outer: Any) -> bool:
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    return isinstance(outer, FP16_UnfusedOptimizer)


class Fragment(NamedTuple):
    """This rank's part of a parameter under ZeRO 1 and 2, and under bfloat16 with float32 sums.

    group: number of the parameter group, whose flat float32 buffer it lies in
    start: its place in the buffer
    first: its place in the parameter, flattened
    size: entries
    """

    group: int
    start: int
    first: int
    size: int


def fragment_of(parameter: nn.Parameter) -> Fragment | None:
    """Where this rank's part lies; None where it has none."""
    mapping: Any = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    taken, kept = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(mapping.param_group_index, kept.start, taken.start, kept.numel)


def has_fragments(module: nn.Module) -> bool:
    """Whether the optimizer keeps parts of flat buffers."""
    return any(hasattr(parameter, "_hp_mapping") for parameter in module.parameters())


def fragment_gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient of this rank's part, flat; there only until the update."""
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    grad: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()  # type: ignore[attr-defined]
    if grad.numel() == parameter.numel():
        # The bfloat16 optimizer sums whole gradients on every rank: only the part that it updates counts here.
        grad = grad.narrow(0, mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)
    return grad


class Partition(NamedTuple):
    """This rank's part of a parameter under ZeRO 3, padded: `size` entries of a flat float32 buffer from `start` on."""

    buffer: nn.Parameter
    start: int
    size: int


def partition_of(outer: Any, parameter: nn.Parameter) -> Partition:
    """Where ZeRO 3 keeps this rank's part of a parameter's float32 copy."""
    number, start, count = outer.grad_position[outer.get_param_id(parameter)]
    return Partition(outer.fp32_partitioned_groups_flat[number], int(start), int(count))


def is_on_nvme(outer: Any) -> bool:
    """Whether the optimizer's state is not in memory."""
    return bool(getattr(outer, "swap_optimizer", False) or getattr(outer, "params_in_nvme_and_cpu", False))


# ---- checkpoints -------------------------------------------------------------------------------------------------


def checkpoint_engine_base() -> Any:
    """The class that writes and reads a checkpoint's files: makedirs, save and load are called on it."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    return TorchCheckpointEngine


def set_checkpoint_engine(engine: Any, make: Callable[[Any], Any]) -> Any:
    """Replace what writes and reads files. make: DeepSpeed's configuration -> the new one, which is returned"""
    engine.checkpoint_engine = make(engine._config)
    copy_script = engine._copy_recovery_script

    def copy_or_warn(place: str) -> None:
        """One rank copies DeepSpeed's scripts beside the checkpoints: an error there would leave the others in a barrier."""
        try:
            copy_script(place)
        except OSError as error:
            log.warning("DeepSpeed's recovery scripts were not copied to %s: %s", place, error)

    engine._copy_recovery_script = copy_or_warn
    return engine.checkpoint_engine


def model_rank_of(engine: Any) -> int:
    """The number by which this rank's files of the model are named."""
    return int(engine.checkpoint_mp_rank)


def set_counters(engine: Any, state: Mapping[str, Any]) -> None:
    """Steps and samples so far, from a checkpoint's bookkeeping."""
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, int(state.get(name, 0)))


def is_optimizer_file(path: Path) -> bool:
    """FORMAT: ZeRO keeps the optimizer in files of its own; otherwise it is beside the weights."""
    return path.name.endswith("optim_states.pt")


def weights_alone(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """What of a file of ZeRO's optimizer are weights that are nowhere else (ZeRO-3); None where there are none."""
    content = state.get("optimizer_state_dict", {})
    kept = ("zero_stage", "partition_count", "fp32_flat_groups")
    return {**state, "optimizer_state_dict": {key: content[key] for key in kept}} if "fp32_flat_groups" in content else None
