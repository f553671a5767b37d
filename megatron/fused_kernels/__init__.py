# SPDX-License-Identifier: Apache-2.0
"""Optional kernels and packages. `available(name)` says why one is absent."""

from megatron.fused_kernels.available import available

__all__ = ["available"]
