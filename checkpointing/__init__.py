"""The files of a run: their format, when they are written, which are kept. Start reading in
manager.py; checkpoint.py says what they hold.
"""
