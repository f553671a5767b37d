# SPDX-License-Identifier: Apache-2.0
"""One optimizer step, evaluation, save and load, whatever runs underneath."""
