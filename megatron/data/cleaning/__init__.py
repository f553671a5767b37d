# SPDX-License-Identifier: Apache-2.0
"""Cleaning and de-duplicating text before it is tokenized."""
