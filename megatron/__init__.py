# SPDX-License-Identifier: Apache-2.0
"""Trains language models. Each room states what it knows; documentation/architecture.md has the floor plan."""
