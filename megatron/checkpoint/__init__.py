# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: stores that know files, mappings that know names and layouts."""
