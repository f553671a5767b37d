# SPDX-License-Identifier: Apache-2.0
"""Rows that pair another side's tensor names and configuration fields with ours."""
