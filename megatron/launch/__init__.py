# SPDX-License-Identifier: Apache-2.0
"""Starting, watching and ending the processes of a run, here and on other machines, with the standard library only."""
