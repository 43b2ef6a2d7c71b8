"""The same training step, faster: a recorded graph, kernels, offloading, the CPU's loss.

Nothing here changes what is computed. Imports the trainer of training, the room model, and what
lies below it.
"""
