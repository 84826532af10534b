"""Many processes: how they find each other, how a model is spread over them, and what ends a run in
which one of them hangs. Start reading in context.py, which says what a step asks of other
processes.
"""
