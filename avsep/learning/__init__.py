"""From clip shards to a trained network.

From the ground up: `parallel`, `bags`, `training`, `practice`, `albums`, `finetuning`, `run`, `steps`, `adapting`.
Import the files themselves: what one step needs loads no other's libraries.
"""
