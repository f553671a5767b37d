# SPDX-License-Identifier: Apache-2.0
"""Training goals: which data, how it becomes a batch, and the loss.

Shapes: `b` rows of a micro batch, `s` sequence.
"""
