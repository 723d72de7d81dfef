"""Passes through a network without side effects: how they are evaluated and differentiated.

These modules hold what applies to any network: contexts that restore what they change (flags, kernels,
precision, buffers, random states), the running mean of batch normalization as a function of the weights, and
what autograd lacks. They depend on PyTorch only. Keys, bits, objectives, doses and processes belong to the
engines and the watermarker.
"""
