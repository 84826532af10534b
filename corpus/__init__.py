"""From text to token ids: reading files, tokenizers, token shards, and the search for validation
text in the training data. Start reading in tokenizing.py.
"""
