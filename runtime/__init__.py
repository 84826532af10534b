"""What a program needs around the training: the command line, the device, signals, the terminal,
file locks. Start reading in command_line.py.
"""
