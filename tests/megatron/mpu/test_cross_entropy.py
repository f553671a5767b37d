# SPDX-License-Identifier: Apache-2.0
"""Token losses equal torch's cross entropy, also for 16-bit and huge logits. Two ranks are tested in test_layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron.mpu.cross_entropy import nll, token_logps
from megatron.mpu.groups import Group


def test_nll_equals_torch() -> None:
    torch.manual_seed(0)
    targets = torch.randint(0, 33, (3, 5))
    weights = torch.randn(3, 5)
    for dtype, scale, tolerance in ((torch.float32, 1.0, 1e-6), (torch.float32, 200.0, 1e-4), (torch.bfloat16, 3.0, 2e-2)):
        ours = (torch.randn(3, 5, 33) * scale).to(dtype).requires_grad_()
        theirs = ours.detach().float().requires_grad_()
        loss = nll(ours, targets, Group.single())
        expected = F.cross_entropy(theirs.flatten(0, 1), targets.flatten(), reduction="none").view(3, 5)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=tolerance)
        (loss * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=tolerance)
        assert torch.equal(token_logps(ours, targets, Group.single()), -loss)
