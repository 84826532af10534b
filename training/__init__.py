"""One optimizer step and what belongs to it: optimizers, evaluation, sampling, compilation, the
estimate of memory. Start reading in step.py.
"""
