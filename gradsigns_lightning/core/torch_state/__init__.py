"""How a pass through a network is evaluated and differentiated, and nothing left of it behind.

Here lives what is true of any network: contexts that put back what they change (flags, kernels, precision,
buffers, random states), the running mean of batch normalization as a function of the weights, and what
autograd lacks. It knows PyTorch only. Keys, bits, objectives, doses and processes do not belong here: the
engines and the watermarker bring them.
"""
