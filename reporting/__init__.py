"""How a run reports: the terminal, the text log, metrics, the picture of the losses, Weights &
Biases. Start reading in run_log.py.
"""
