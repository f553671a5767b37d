# SPDX-License-Identifier: Apache-2.0
"""Weights and run state from a step folder, at any layout."""
