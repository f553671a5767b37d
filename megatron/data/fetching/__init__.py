# SPDX-License-Identifier: Apache-2.0
"""Corpora by name: fetched, checked, prepared."""
