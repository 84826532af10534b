"""How a command line becomes the settings of a run: presets, batch sizes and file paths. The
settings themselves are in config.py. Start reading in command_line.py.
"""
