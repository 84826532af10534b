"""From the command line to the settings of a run: presets, the batch, and where its files are. The
settings themselves are in config.py. Start reading in command_line.py.
"""
