# SPDX-License-Identifier: Apache-2.0
"""What this project expects of DeepSpeed's inner parts: after an upgrade, a failure names what to change in deepspeed_private.py."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron import deepspeed_private as private
from megatron.engine.deepspeed_runner import Runner
from megatron.engine.distributed import start
from megatron.launch.environment import Rendezvous
from megatron.optim.schedules import Decay, LRScheduler, ScheduleSpec
from support.dist import run_distributed
from support.tree import ROOT, relative

FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero0": {},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3}},
    "bf16 without zero": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}},
    "bf16 zero1": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, **FP32_SUMS},
}


class Small:
    """A linear layer under DeepSpeed, stepped with any number of micro batches."""

    def __init__(self, groups: Any, layout: dict[str, Any]) -> None:
        half = "bf16" in layout
        torch.manual_seed(0)
        self.model = torch.nn.Linear(6, 5, bias=False).to(torch.bfloat16 if half else torch.float32)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, weight_decay=0.0)
        schedule = LRScheduler(optimizer, ScheduleSpec(start_lr=0.1, decay_style=Decay.CONSTANT, end_iter=10))
        batch = {"train_batch_size": groups.world.size, "train_micro_batch_size_per_gpu": 1}
        config = {**batch, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True, **layout}
        if "stage" in config.get("zero_optimization", {}) and config["zero_optimization"]["stage"] == 3:
            config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
        self.runner = Runner(self.model, optimizer, schedule, config, groups)
        self.rank = groups.world.rank
        self.size = groups.world.size
        self.parameter = next(self.model.parameters())

    def step(self, count: int) -> None:
        engine = self.runner.deepspeed
        private.set_micro_batches(engine, count)
        for number in range(count):
            engine.set_gradient_accumulation_boundary(number == count - 1)
            x = torch.arange(6.0).add(1 + number + 10 * self.rank).to(self.model.weight.dtype)[None] / 16
            engine.backward(engine(x).float().square().sum() * self.size, scale_wrt_gas=False)
            engine.step()


def parts(rank: int, world: int) -> dict[str, Any]:
    """Of each layout: where this rank's part of the weight, its gradient and state lie, and the weight after steps of 1, 3 and 2."""
    groups = start(
        Rendezvous(rank=rank, world_size=world, local_rank=rank, master_addr="127.0.0.1", master_port=int(os.environ["MASTER_PORT"])),
        torch.device("cpu"),
    )
    found = {}
    for name, layout in LAYOUTS.items():
        small = Small(groups, layout)
        shards = small.runner.local_shards()
        seen: dict[str, Any] = {"calls": 0}

        def look(small: Small = small, shards: Any = shards, seen: dict[str, Any] = seen) -> None:
            seen["calls"] += 1
            seen["gradient"] = shards.gradient(small.parameter).float().clone()

        small.runner.watch(look)
        for count in (1, 3, 2):
            small.step(count)
        outer = small.runner.optimizer
        found[name] = {
            **seen,
            "entries": private.entries_of(small.parameter),
            "partitioned": private.is_partitioned(small.parameter),
            "fragments": private.has_fragments(small.model),
            "fragment": private.fragment_of(small.parameter),
            "copies": len(private.copies_of(outer)),
            "micro_batches": small.runner.deepspeed.gradient_accumulation_steps(),
            "steps": small.runner.deepspeed.global_steps,
            "weight": shards.weight(small.parameter).float().flatten().clone(),
            "state": shards.states(small.parameter)["exp_avg"].float().flatten().clone(),
            "scale": private.loss_scale_of(small.runner.deepspeed),
            "nvme": private.is_on_nvme(outer),
            "model_rank": private.model_rank_of(small.runner.deepspeed),
        }
        if found[name]["partitioned"]:
            buffer, begin, count = private.partition_of(outer, small.parameter)
            found[name]["partition"] = buffer.detach()[begin : begin + count].clone()
    return found


@pytest.mark.dist
@pytest.mark.timeout(150)
def test_where_deepspeed_keeps_weights_gradients_and_states() -> None:
    """Parts of two ranks make up the whole, one update follows however many micro batches, and every layout comes to the same weight."""
    ranks = run_distributed(parts, 2, 120, init=False)
    whole = ranks[0]["zero0"]
    assert (whole["calls"], whole["steps"], whole["micro_batches"], whole["entries"]) == (3, 3, 2, 30)
    assert whole["fragment"] is None and whole["scale"] is None and not whole["nvme"] and whole["model_rank"] == 0
    assert torch.equal(whole["weight"], ranks[1]["zero0"]["weight"])
    for name in LAYOUTS:
        one, other = ranks[0][name], ranks[1][name]
        assert (one["calls"], one["steps"], one["micro_batches"], one["entries"]) == (3, 3, 2, 30), name
        assert one["partitioned"] is (name == "zero3") and one["fragments"] is (name in ("zero1", "zero2", "bf16 zero1")), name
        assert one["copies"] == (1 if name == "bf16 without zero" else 0)
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if "bf16" in name else {"rtol": 1e-5, "atol": 1e-6}
        for key in ("weight", "state", "gradient"):
            mine = one[key].flatten() if name in ("zero0", "bf16 without zero") else torch.cat([one[key].flatten(), other[key].flatten()])
            torch.testing.assert_close(mine, whole[key].flatten(), **tolerance, msg=lambda text, at=(name, key): f"{at}: {text}")
    third = ranks[1]["zero3"]
    assert torch.equal(third["partition"][: third["weight"].numel()], third["weight"])
    first = ranks[1]["zero2"]["fragment"]
    assert (first.group, first.start, first.first, first.size) == (0, 0, 16, 14)


def test_a_refused_step_is_seen_by_zero() -> None:
    """ZeRO looks for overflows in float32 while it is told to, and is then as it was."""
    small = Small(start(Rendezvous(), torch.device("cpu")), LAYOUTS["zero1"])
    outer = small.runner.optimizer
    configured = outer.check_grad_overflow
    with private.overflow_checked(outer, True):
        assert outer.check_grad_overflow is True
    assert outer.check_grad_overflow is configured
    before = small.model.weight.detach().clone()
    small.model.weight.register_hook(lambda grad: grad * float("nan"))
    small.step(1)
    assert small.runner.not_finite == "gradient on rank 0" and torch.equal(small.model.weight, before)


def test_a_backward_pass_can_be_begun_by_hand_and_parts_exist() -> None:
    """The pipeline's last stage does; the names that are imported where they are needed are there."""
    small = Small(start(Rendezvous(), torch.device("cpu")), LAYOUTS["bf16 zero1"])
    small.step(1)
    private.begin_backward(small.runner.deepspeed)
    assert {"makedirs", "save", "load", "commit"} <= set(dir(private.checkpoint_engine_base()))
    assert private.muon_class().__name__ == "MuonWithAuxAdam"
    installed, optimizer, builder = private.cpu_adam_parts()
    assert isinstance(installed, bool) and optimizer.__name__ == "DeepSpeedCPUAdam" and builder.name == "cpu_adam"
    private.set_counters(small.runner.deepspeed, {"global_steps": 7, "global_samples": 9})
    assert (small.runner.deepspeed.global_steps, small.runner.deepspeed.skipped_steps) == (7, 0)
    assert private.is_optimizer_file(Path("zero_pp_rank_0_mp_rank_00_optim_states.pt"))
    content = {"zero_stage": 3, "partition_count": 2, "fp32_flat_groups": [1], "optimizer_state_dict": {}}
    assert private.weights_alone({"optimizer_state_dict": content}) == {
        "optimizer_state_dict": {"zero_stage": 3, "partition_count": 2, "fp32_flat_groups": [1]}
    }
    assert private.weights_alone({"optimizer_state_dict": {}}) is None


def stages(rank: int, world: int) -> list[int]:
    """Layers of this rank's stage, and micro batches that it counted."""
    from deepspeed.pipe import PipelineModule

    start(Rendezvous(), torch.device("cpu"))
    module = PipelineModule([torch.nn.Identity() for _ in range(3)], num_stages=1)
    private.count_micro_batch(module)
    return [len(private.stage_layers(module)), module.micro_offset]


def test_a_pipeline_stage_is_a_list_of_layers() -> None:
    assert run_distributed(stages, 1, 60, init=False) == [[3, 1]]


PRIVATE = ("_hp_mapping", "ds_id", "ds_numel", "ds_pipe_replicated", "forward_funcs", "micro_offset", "_take_model_step",
           "_backward_prologue", "_copy_recovery_script", "fp16_groups", "fp32_partitioned_groups_flat", "grad_position",
           "checkpoint_mp_rank", "see_memory_usage", "__compatible_ops__")  # fmt: skip


def test_inner_parts_are_named_in_one_file() -> None:
    found = []
    for path in sorted((ROOT / "megatron").rglob("*.py")):
        if path.name == "deepspeed_private.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else None
            if name in PRIVATE:
                found.append(f"{relative(path)}:{node.lineno}: {name}")
    assert not found, found
