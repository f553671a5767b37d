# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run as Hugging Face models, written while it goes on."""
