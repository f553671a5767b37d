# SPDX-License-Identifier: Apache-2.0
"""Self-attention: project, normalise, rotate, attend, project back. Knows no residual stream."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron.errors import ConfigError
from megatron.model.attention import backends
from megatron.model.attention.masks import Documents, document_positions
from megatron.model.attention.qkv import layout
from megatron.model.attention.view import BiasOf, View
from megatron.model.cache import LayerCache
from megatron.model.norms import HeadNorm
from megatron.model.positions import Alibi, RelativeBias, Rotary, rotate
from megatron.model.spec import AttentionSpec
from megatron.mpu.groups import Group
from megatron.mpu.layers import ColumnLinear, RowLinear
from megatron.mpu.random import head_seeds


class SelfAttention(nn.Module):
    """Causal self-attention with MHA, GQA or MQA.

    FORMAT: query_key_value, dense, rotary_emb, rpe, alibi_embed, qk_layernorm, q_norm, k_norm.
    defer_reduce: give this rank's share of the output (see RowLinear)
    Raises ConfigError where the spec does not fit together, BackendError in forward where its back end is absent.
    """

    def __init__(self, spec: AttentionSpec, *, tp: Group, defer_reduce: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.tp = tp
        self.scale = 1.0 / math.sqrt(spec.head_dim) if spec.softmax_scale is None else spec.softmax_scale
        self.layout = layout(spec, tp.size)
        rows, width = layout(spec), spec.num_heads * spec.head_dim
        self.query_key_value = ColumnLinear(spec.hidden_size, sum(rows.sizes), tp=tp, bias=spec.bias, parts=rows.parts)
        self.dense = RowLinear(width, spec.hidden_size, tp=tp, bias=spec.bias, defer_reduce=defer_reduce)
        self.rotary_emb = None if spec.rotary is None else Rotary(spec.rotary)
        self.rpe = None if spec.rpe is None else RelativeBias(spec.rpe, spec.num_heads, spec.head_dim, tp=tp)
        self.alibi_embed = Alibi(spec.num_heads, tp=tp) if spec.alibi else None
        if spec.qk_norm is None:
            return
        if spec.separate_qk_norms:
            self.q_norm = HeadNorm(spec.qk_norm, spec.num_heads, spec.head_dim, tp=tp, flat=True)
            self.k_norm = HeadNorm(spec.qk_norm, spec.num_kv_heads, spec.head_dim, tp=tp, flat=True)
        elif spec.num_heads != spec.num_kv_heads:
            raise ConfigError(
                f"one norm cannot serve {spec.num_heads} query heads and {spec.num_kv_heads} key heads",
                where="use_qk_layernorm",
                mend="set use_separate_qk_norms: true, or leave num_kv_heads unset",
            )
        else:
            self.qk_layernorm = HeadNorm(spec.qk_norm, spec.num_heads, spec.head_dim, tp=tp, flat=False)

    def forward(self, hidden: Tensor, segments: Tensor | Documents | None = None, cache: LayerCache | None = None) -> Tensor:
        """hidden [b, s, h], segments [b, s] -> [b, s, h].

        segments: document numbers, or the Documents made of them once for all layers; with a cache a row is one document
        cache:    keys and values of earlier tokens; the new ones are appended
        """
        isolated = self.spec.isolated and cache is None
        documents = Documents.of(segments) if isolated else None
        q, k, v = self.layout.split(self.query_key_value(hidden))
        b, s = q.shape[:2]
        q, k = self._normalise(q, k)
        if self.rotary_emb is not None:
            before = 0 if cache is None else cache.length
            in_row = torch.arange(before, before + s, device=q.device)[None]
            cos, sin = self.rotary_emb(in_row if documents is None else document_positions(documents.segments))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(k, v)
        attend = backends.pick(self.spec, q.device, q.dtype, dropout=self._dropout() > 0.0)
        context = attend(q, k, v, self._view(q, documents))
        out: Tensor = self.dense(context.reshape(b, s, -1))
        return out

    def _normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.spec.qk_norm is None:
            return q, k
        if self.spec.separate_qk_norms:
            return self.q_norm(q), self.k_norm(k)
        return self.qk_layernorm(q), self.qk_layernorm(k)

    def _dropout(self) -> float:
        return self.spec.dropout if self.training else 0.0

    def _view(self, q: Tensor, documents: Documents | None) -> View:
        alibi, rpe = self.alibi_embed, self.rpe
        bias: BiasOf | None = rpe
        if alibi is not None:
            bias = lambda queries, keys: alibi(queries, keys, q.device)  # noqa: E731
        return View(
            documents=documents,
            window=self.spec.window,
            scale=self.scale,
            divisor=self.spec.logit_divisor,
            bias=bias,
            slopes=None if alibi is None else alibi.slopes(q.device),
            dropout=self._dropout(),
            seeds=head_seeds(self.layout.heads, self.tp) if self._dropout() > 0.0 else (),
            fp32=self.spec.softmax_in_fp32,
        )
