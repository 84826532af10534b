"""What a program needs around any training: flags, files, the device, signals and the terminal.
Nothing here knows of GPTs. Start reading in device.py.
"""
