# SPDX-License-Identifier: Apache-2.0
"""Attention: the fused projection's layout, what each token may see, and the back ends that compute it."""
