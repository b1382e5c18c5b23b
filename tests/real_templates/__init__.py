"""Tests on tokenizers and chat templates of real model families, fetched once and never part of the repository."""
