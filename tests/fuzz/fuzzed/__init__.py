"""Parsers of foreign bytes, each with its law, its seeds and its limit."""
