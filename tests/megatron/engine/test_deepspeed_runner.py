# SPDX-License-Identifier: Apache-2.0
"""What the runner fixes in DeepSpeed's optimizers."""

from __future__ import annotations

import pytest
import torch

from megatron.engine.deepspeed_runner import Runner
from megatron.engine.distributed import start
from megatron.launch.environment import Rendezvous
from megatron.optim.schedules import Decay, LRScheduler, ScheduleSpec

ZERO_1 = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
LAYOUTS = {
    "fp32": {},
    "zero1": ZERO_1,
    "bf16 zero1": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, **ZERO_1},
    "bf16 without ZeRO": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_adam_step_is_the_first(layout: str) -> None:
    """Adam's first update is the learning rate, whatever the gradient; after a rehearsal on zero gradients it would be 0.74 of it."""
    groups = start(Rendezvous(), torch.device("cpu"))
    model = torch.nn.Linear(4, 3, bias=False).to(torch.bfloat16 if "bf16" in layout else torch.float32)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    schedule = LRScheduler(optimizer, ScheduleSpec(start_lr=0.5, decay_style=Decay.CONSTANT, end_iter=10))
    config = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, **LAYOUTS[layout]}
    runner = Runner(model, optimizer, schedule, config, groups)
    engine = runner.deepspeed
    engine.backward(engine(torch.ones(1, 4, dtype=model.weight.dtype)).float().sum())
    engine.step()
    torch.testing.assert_close(model.weight.float(), torch.full((3, 4), -0.5), rtol=1e-2, atol=0)
