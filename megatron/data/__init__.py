# SPDX-License-Identifier: Apache-2.0
"""From token files to micro batches. Letters in docstrings: `s` sequence length, `n` samples, `d` documents."""
