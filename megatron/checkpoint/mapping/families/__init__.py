# SPDX-License-Identifier: Apache-2.0
"""Foreign architectures, one file each: rows of tensor names and rows of config fields."""
