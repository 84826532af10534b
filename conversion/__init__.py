"""Models in and out: weights of Hugging Face, nanoGPT and llm.c. Start reading in weights.py; the
commands of hf.py are in commands.py.
"""
