# SPDX-License-Identifier: Apache-2.0
"""Copies of checkpoints elsewhere, and models from elsewhere."""
