"""The checks, a module an area. Each is a function of `Draw` that raises where normclip and an oracle differ."""
