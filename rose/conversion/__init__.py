"""Reads training data of other services and tools and writes chat JSONL: what `rose files convert` does. No torch.

`opening` finds out what a file is by its first bytes, `sources` turns it into rows, `recognising` says which format
the rows have, one module per family maps a row, and `converting` puts them together.
"""
