"""Conversations to text and tokens, proven for each: what is said is in the text, and what is learned is the answer."""
