# SPDX-License-Identifier: Apache-2.0
"""TensorBoard, Weights & Biases and Comet: where a run's numbers are sent besides its own file."""
