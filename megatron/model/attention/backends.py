# SPDX-License-Identifier: Apache-2.0
"""The ways to compute attention, and the choice among them. All give the same result; each says what it refuses."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.errors import BackendError
from megatron.fused_kernels import available
from megatron.model.attention import flash, varlen
from megatron.model.attention.inputs import AttentionInputs
from megatron.model.attention.masks import allowed, needs_no_mask
from megatron.model.spec import AttentionSpec, BackendName
from megatron.mpu.random import drop_by_head, seeded


class Attend(Protocol):
    """q [b, s, n, d], k and v [b, t, g, d] (t > s with a cache) -> [b, s, n, d]. Vaswani et al., arXiv 1706.03762, eq. 1."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, view: AttentionInputs) -> Tensor: ...


def eager(q: Tensor, k: Tensor, v: Tensor, view: AttentionInputs) -> Tensor:
    """The reference: scores, mask, softmax, product. Shapes as in `Attend`."""
    s, t, n, repeat = q.shape[1], k.shape[1], q.shape[2], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
    scores = torch.einsum("bsnd,btnd->bnst", q * (view.scale / view.divisor), k)
    if view.fp32 or view.divisor != 1.0:
        scores = scores.float() * view.divisor
    if view.bias is not None:
        scores = scores + view.bias(s, t).view(1, n, s, t)
    see = allowed(s, t, view.window, q.device, view.documents)
    probs = scores.masked_fill(~see, float("-inf")).softmax(dim=-1).to(q.dtype)
    if view.dropout > 0.0:
        probs = drop_by_head(probs, view.dropout, view.seeds)
    return torch.einsum("bnst,btnd->bsnd", probs, v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, view: AttentionInputs) -> Tensor:
    """torch's scaled_dot_product_attention; packed documents are computed one by one. Shapes as in `Attend`."""
    if view.dropout > 0.0:
        # The kernel draws by itself, one stream for all heads: ranks of a tensor group must not draw alike.
        with seeded(view.seeds[0], q.device):
            return _sdpa_documents(q, k, v, view)
    return _sdpa_documents(q, k, v, view)


def _sdpa_documents(q: Tensor, k: Tensor, v: Tensor, view: AttentionInputs) -> Tensor:
    if view.documents is None:
        return _sdpa_rows(q, k, v, view)
    # A document never meets its neighbours, so nothing of them can reach it; and there is no mask of s * s.
    lengths = list(view.documents.lengths)
    queries, keys, values = (x.flatten(0, 1)[None].split(lengths, dim=1) for x in (q, k, v))
    out = torch.cat([_sdpa_rows(*piece, view) for piece in zip(queries, keys, values, strict=True)], dim=1)
    return out.view(q.shape)


def _sdpa_rows(q: Tensor, k: Tensor, v: Tensor, view: AttentionInputs) -> Tensor:
    """Rows of one document each."""
    s = q.shape[1]
    if s == 1 and view.window is not None and k.shape[1] > view.window + 1:
        k, v = k[:, -view.window - 1 :], v[:, -view.window - 1 :]
    t = k.shape[1]
    mask: Tensor | None = None
    causal = view.bias is None and s > 1 and needs_no_mask(s, t, view.window)
    if not causal and (s > 1 or view.bias is not None):
        see = allowed(s, t, view.window, q.device)
        mask = see if view.bias is None else view.bias(s, t).to(q.dtype).masked_fill(~see, float("-inf"))[None]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=view.dropout,
        is_causal=causal,
        scale=view.scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def refuses(name: BackendName, spec: AttentionSpec, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a back end cannot compute this attention here; None when it can."""
    if name in (BackendName.AUTO, BackendName.EAGER, BackendName.SDPA):
        return None
    if device.type != "cuda":
        return f"{name.value} runs on CUDA, not on {device.type}"
    if name is BackendName.VARLEN:
        return available("varlen") or varlen.refuses(spec, dtype)
    return available("flash_attn") or flash.refuses(spec, dtype)


def pick(spec: AttentionSpec, device: torch.device, dtype: torch.dtype, *, dropout: bool = False) -> Attend:
    """The back end of a spec on a device. A named one is that one or an error; `auto` is always found.

    dropout: attention weights will be dropped. The same ones at any tensor parallel size by EAGER, which `auto` then takes on a CPU,
             where SDPA has no fused kernel for it either; fused kernels draw a stream of their own on each rank.

    Raises BackendError with the reason a named back end is refused.
    """
    name = spec.backend
    if name is BackendName.AUTO:
        # SDPA has no fast kernel for documents and windows; varlen has.
        gains = device.type == "cuda" and (spec.isolated or spec.window is not None)
        wanted = [BackendName.FLASH_ATTN] * spec.flash + [BackendName.VARLEN] * gains
        fallback = BackendName.EAGER if dropout and device.type == "cpu" else BackendName.SDPA
        name = next((other for other in wanted if refuses(other, spec, device, dtype) is None), fallback)
    reason = refuses(name, spec, device, dtype)
    if reason is not None:
        raise BackendError(
            f"attention_backend {name.value} was asked for, but {reason}", where="attention_backend", fix="use attention_backend: auto"
        )
    table: dict[BackendName, Attend] = {
        BackendName.EAGER: eager,
        BackendName.SDPA: sdpa,
        BackendName.VARLEN: varlen.attend,
        BackendName.FLASH_ATTN: flash.attend,
    }
    return table[name]
