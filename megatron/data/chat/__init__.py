# SPDX-License-Identifier: Apache-2.0
"""Conversations, preference pairs and their loss masks."""
