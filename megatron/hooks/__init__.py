# SPDX-License-Identifier: Apache-2.0
"""What happens around the steps: the console, metrics, checkpoints, evaluation, stopping. Never computes a step."""
