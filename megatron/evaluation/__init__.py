# SPDX-License-Identifier: Apache-2.0
"""Evaluates a trained model. Names only."""
