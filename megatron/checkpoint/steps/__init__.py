# SPDX-License-Identifier: Apache-2.0
"""Step folders of a run: names, manifests, discovery, retention, lock."""
