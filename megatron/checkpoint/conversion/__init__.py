# SPDX-License-Identifier: Apache-2.0
"""From a step's folder to a Hugging Face directory and back, a tensor at a time."""
