# SPDX-License-Identifier: Apache-2.0
"""Takes up where a run left off. Names only."""
