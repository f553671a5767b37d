# SPDX-License-Identifier: Apache-2.0
"""What is done with finished `.bin/.idx` files: merged, looked into, measured."""
