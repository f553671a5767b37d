# SPDX-License-Identifier: Apache-2.0
"""Step folders of a run: names, manifests, writing, discovery, retention, lock, copies in S3."""
