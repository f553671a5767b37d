# SPDX-License-Identifier: Apache-2.0
"""From records of any kind to `.bin/.idx` files: read, encoded in parallel, written aside, published together."""
